"""`model.args`: sizes of the model that replace those of its flavor, as `dim=384,n_layers=8,moe.top_k=4`.

They are fields of the flavor's own arguments, a frozen dataclass, which may contain another (`moe`).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from octavo.config.values import BadValue, convert
from octavo.core.errors import ConfigError, did_you_mean
from octavo.families.model_args import ModelArgs, MoEArgs

Args = TypeVar("Args")

_SET_ELSEWHERE = {"max_seq_len": "training.seq_len", "document_end": "training.document_mask"}
_MAY_BE_ZERO = ("head_dim", "vocab_size", "n_shared", "first_dense", "bias_rate", "balance_loss")


def apply(args: Args, settings: Sequence[str]) -> Args:
    """`args` with `settings` in place of its own values.

    Raises:
        ConfigError: there is no such field, or its value is wrong or does not fit the others.
    """
    names = [setting.partition("=")[0].strip() for setting in settings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"model.args sets {twice[0]} twice; set it once")
    for setting, name in zip(settings, names, strict=True):
        if "=" not in setting:
            raise ConfigError(f"model.args = {setting!r}: expected NAME=VALUE, as in dim=384,n_layers=8")
        args = _replace(args, name, setting.partition("=")[2].strip(), whole=name)
    if settings and isinstance(args, ModelArgs):
        for problem in _misfits(args):
            raise ConfigError(f"model.args = {','.join(settings)}: {problem}")
    return args


def between(args: Any, wanted: Any, prefix: str = "") -> list[str] | None:
    """The settings that make `wanted` out of `args`, but for fields that are set elsewhere; None if no
    settings do.
    """
    settings: list[str] = []
    for field in dataclasses.fields(args):
        old, new = getattr(args, field.name), getattr(wanted, field.name)
        if old == new or field.name in _SET_ELSEWHERE:
            continue
        if type(old) is not type(new):
            return None
        if dataclasses.is_dataclass(old):
            inner = between(old, new, f"{prefix}{field.name}.")
            if inner is None:
                return None
            settings += inner
        else:
            settings.append(f"{prefix}{field.name}={str(new).lower() if isinstance(new, bool) else new}")
    return settings


def _replace(args: Args, name: str, text: str, *, whole: str) -> Args:
    if not dataclasses.is_dataclass(args) or isinstance(args, type):
        raise ConfigError(
            f"model.args: this model's arguments are no dataclass, so {whole} cannot be set; leave it out"
        )
    first, _, rest = name.partition(".")
    hints = get_type_hints(type(args))
    if first not in hints:
        known = did_you_mean(first, hints) or f"; it has {', '.join(hints)}"
        raise ConfigError(f"model.args: this model has no {whole}{known}")
    if first in _SET_ELSEWHERE:
        raise ConfigError(f"model.args: {whole} follows from {_SET_ELSEWHERE[first]}; set that")
    kind, value = hints[first], getattr(args, first)
    if rest or any(map(dataclasses.is_dataclass, (kind, *get_args(kind)))):
        if not rest or not dataclasses.is_dataclass(value):
            remedy = f"set its fields: {first}.NAME=1" if not rest else f"this flavor has no {first}"
            raise ConfigError(f"model.args: {whole} cannot be set; {remedy}")
        return dataclasses.replace(args, **{first: _replace(value, rest, text, whole=whole)})
    try:
        new = convert(kind, text, text=True)
    except BadValue as error:
        raise ConfigError(f"model.args: {whole}: {error}") from None
    if not isinstance(new, bool | str | None) and not _in_range(first, new):
        least = "0 or more" if first in _MAY_BE_ZERO else "more than 0"
        raise ConfigError(f"model.args: {whole} = {text}: must be {least}, and at most 2^31 - 1")
    return dataclasses.replace(args, **{first: new})


def _in_range(name: str, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or (value == 0 and name in _MAY_BE_ZERO)) and value < 2**31


def _misfits(args: ModelArgs) -> Iterator[str]:
    """What makes the sizes no model."""
    if not args.head_dim and args.dim % args.n_heads:
        yield f"{args.n_heads} heads do not divide dim {args.dim}; change one, or set head_dim"
    elif args.head_width % 2:
        yield f"a head of {args.head_width} cannot be rotated in pairs; make it even"
    if args.n_heads % args.n_kv_heads:
        yield f"n_heads {args.n_heads} must be a multiple of n_kv_heads {args.n_kv_heads}"
    if args.moe is not None:
        yield from _misfits_of_experts(args.moe)


def _misfits_of_experts(moe: MoEArgs) -> Iterator[str]:
    if moe.groups_kept > moe.groups or moe.n_experts % moe.groups:
        yield f"{moe.groups} groups, {moe.groups_kept} of them kept, do not divide {moe.n_experts} experts"
    elif moe.groups > 1 and moe.n_experts // moe.groups < 2:
        yield f"{moe.groups} groups of {moe.n_experts} experts: a group's best two are compared; lower groups"
    elif moe.top_k > moe.n_experts // moe.groups * moe.groups_kept:
        yield f"top_k {moe.top_k} of {moe.n_experts // moe.groups * moe.groups_kept} experts; lower it"
