"""Swaps a model's `nn.Linear`s, and the products of its experts, for float8 ones, and filters which.

Swapping keeps the parameters as they are, so that optimizers, checkpoints and state dicts keep working. Which
layers gain is a trade-off: float8 products are faster, but casts cost memory traffic, so small layers lose
time. The automatic filters use torchao's measured thresholds.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from octavo.float8.config import Float8LinearRecipeName, Options, resolve
from octavo.float8.grouped import Float8GroupedMM, GroupedProduct, why_not_grouped
from octavo.float8.linear import Float8Linear
from octavo.float8.recipe import FULL, Recipe, find_recipe

ModuleFilter = Callable[[nn.Module, str], bool]
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_CALLED_NAMES = ("fqn", "name", "module_name", "path")


def _swap(module: nn.Module, fqn: str, replace: Callable[[nn.Linear, str], nn.Module | None]) -> nn.Module:
    """`module` with each linear replaced by `replace(linear, fqn)` unless that is None; children first."""
    for name, child in list(module._modules.items()):  # named_children would skip a module's second place
        if child is None:
            continue
        new = _swap(child, f"{fqn}.{name}" if fqn else name, replace)
        if new is not child:
            setattr(module, name, new)
    if isinstance(module, nn.Linear):
        return replace(module, fqn) or module
    return module


def _why_unable(linear: nn.Linear) -> str | None:
    """Why `linear` cannot become a Float8Linear without changing what it computes, or None."""
    kind = type(linear).__name__
    if isinstance(linear, LazyModuleMixin):
        return "has no sizes yet: run one forward pass before converting"
    if type(linear) is NonDynamicallyQuantizableLinear:
        return "belongs to an nn.MultiheadAttention, which reads its weight and never calls it"
    if type(linear).forward is not nn.Linear.forward:
        return f"is a {kind} with a forward of its own, which would be lost"
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        return (
            "computes its weight (a parametrization, weight_norm, pruning): convert first, and apply that "
            "to the Float8Linear"
        )
    return None


def plain_name(fqn: str) -> str:
    """`fqn` without what torch.compile, activation checkpointing and FSDP add to names."""
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS)


def _check_filter(module_filter_fn: Any) -> None:
    if not callable(module_filter_fn):
        raise TypeError(
            f"module_filter_fn is a {type(module_filter_fn).__name__}; it must be a function of a module and "
            "its name"
        )
    try:
        names = list(inspect.signature(module_filter_fn).parameters)[:2]
    except (TypeError, ValueError):  # a builtin without one
        return
    if len(names) == 2 and names[0] in _CALLED_NAMES and names[1] not in _CALLED_NAMES:
        taken = ", ".join(names)
        raise TypeError(f"module_filter_fn takes ({taken}); it is called with (module, fqn): swap them")


def _accepts(module_filter_fn: ModuleFilter, linear: nn.Module, fqn: str) -> bool:
    name = plain_name(fqn)
    try:
        accepted = module_filter_fn(linear, name)
    except Exception as error:
        error.add_note(f"raised by module_filter_fn(module, fqn) for {type(linear).__name__} {name!r}")
        raise
    if not isinstance(accepted, bool):
        got = f"{accepted!r:.60}"
        raise TypeError(f"module_filter_fn returned {got} for {name!r}; it must return True or False")
    return accepted


def _ends_feed_forward(linear: nn.Linear, siblings: Sequence[nn.Linear]) -> bool:
    """Whether `linear` maps a feed-forward's wide layer back to the narrow one.

    Its input is computed elementwise from outputs that are saved for backward anyway. So compiled code saves
    memory by recomputing the cast: a block saves 0.74 of bfloat16's bytes instead of 0.82.
    """
    narrows = linear.in_features > linear.out_features
    shape = (linear.out_features, linear.in_features)
    return narrows and any((other.in_features, other.out_features) == shape for other in siblings)


def convert_to_float8_training(
    module: nn.Module,
    *,
    module_filter_fn: ModuleFilter | None = None,
    config: Options | None = None,
) -> nn.Module:
    """Swap the `nn.Linear`s in `module` for `Float8Linear`s, in place; if `module` is one, return its
    replacement.

    module_filter_fn(module, fqn): whether to convert that linear; None converts all.

    config: a `Float8LinearConfig`, a `Recipe`, or a recipe's name; None means `Float8LinearConfig()`,
    tensorwise.

    Modules with weights for grouped products (`grouped.py`), as of a mixture of experts, are converted too,
    if the recipe allows it.

    Parameters remain the same objects, so an existing optimizer keeps working; a linear in two places remains
    one; hooks, buffers and attributes are kept. Warns if nothing was converted, and about linears that cannot
    be: those with a forward of their own, a computed weight, or no sizes yet, and nn.MultiheadAttention's.
    Raises TypeError if `module` is not a module or the filter does not return a bool, ValueError after
    `fully_shard`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert_to_float8_training takes a torch.nn.Module, not a {type(module).__name__}")
    if module_filter_fn is not None:
        _check_filter(module_filter_fn)
    options = resolve(config)[1]  # a bad configuration fails even if nothing is converted
    linears = {fqn: m for fqn, m in module.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    # Filter all before swapping any: a filter that raises leaves the model unchanged.
    accepted = [
        fqn
        for fqn, linear in linears.items()
        if not isinstance(linear, Float8Linear)
        and (module_filter_fn is None or _accepts(module_filter_fn, linear, fqn))
    ]
    unable = {fqn: reason for fqn in accepted if (reason := _why_unable(linears[fqn])) is not None}
    if unable:
        shown = "; ".join(f"{fqn or 'the root'} {reason}" for fqn, reason in list(unable.items())[:3])
        more = f"; and {len(unable) - 3} more" if len(unable) > 3 else ""
        warnings.warn(
            f"convert_to_float8_training left {len(unable)} linear layers unconverted: {shown}{more}",
            stacklevel=2,
        )
    chosen = {fqn: linears[fqn] for fqn in accepted if fqn not in unable}
    managed = any(isinstance(m, FSDPModule) for m in module.modules())
    for_fsdp = options is not None and options.enable_fsdp_float8_all_gather
    sharded = [fqn for fqn, linear in chosen.items() if isinstance(linear.weight, DTensor)]
    if sharded and (managed or for_fsdp):
        raise ValueError(
            f"{sharded[0]} is sharded already: convert first, and apply fully_shard to the converted model"
        )
    grouped = _convert_grouped(module, module_filter_fn, config)
    swapped: dict[int, Float8Linear] = {}
    total, already = len(linears), sum(isinstance(m, Float8Linear) for m in linears.values())

    def replace(linear: nn.Linear, fqn: str) -> nn.Module | None:
        if fqn not in chosen:
            return None
        if id(linear) not in swapped:
            swapped[id(linear)] = Float8Linear.from_float(linear, config)
        return swapped[id(linear)]

    module = _swap(module, "", replace)
    for parent in module.modules():
        children = [child for child in parent.children() if isinstance(child, nn.Linear)]
        for child in children:
            if isinstance(child, Float8Linear) and _ends_feed_forward(child, children):
                child.keep_input = False
    if not swapped and not unable and not grouped:
        reason = (
            f"all {total} are float8 already"
            if total and already == total
            else f"module_filter_fn accepted none of its {total} nn.Linear modules"
            if total
            else "it has no nn.Linear modules"
        )
        warnings.warn(
            f"convert_to_float8_training changed nothing in {type(module).__name__}: {reason}", stacklevel=2
        )
    return module


def grouped_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that multiply groups of rows by weights of their own, by name (`grouped.py`)."""
    return {fqn: m for fqn, m in module.named_modules() if getattr(m, "grouped_weights", ())}


def _convert_grouped(
    module: nn.Module, module_filter_fn: ModuleFilter | None, config: Options | None
) -> list[str]:
    """Give accepted modules with grouped weights a float8 product; returns their names."""
    accepted = {
        fqn: m
        for fqn, m in grouped_modules(module).items()
        if not isinstance(m.product, Float8GroupedMM)
        and (module_filter_fn is None or _accepts(module_filter_fn, m, fqn))
    }
    why = why_not_grouped(resolve(config)[0])
    if accepted and why is not None:
        warnings.warn(
            f"convert_to_float8_training left the experts of {len(accepted)} layers unconverted: {why}. "
            "rowwise, blockwise and mxfp8 convert them",
            stacklevel=3,
        )
        return []
    for m in accepted.values():
        high_precision = cast(GroupedProduct, m.product)
        m.product = Float8GroupedMM(config, high_precision=high_precision)  # type: ignore[assignment]
    return list(accepted)


def convert_from_float8_training(module: nn.Module) -> nn.Module:
    """Swap the `Float8Linear`s in `module` back for plain `nn.Linear`s, in place.

    For tools that expect `nn.Linear` once training is over, such as quantization for inference. A root that
    is a Float8Linear is returned swapped. Parameters stay the same objects, in their dtype. Raises ValueError
    if a weight is sharded.
    """
    linears = {fqn: m for fqn, m in module.named_modules() if isinstance(m, Float8Linear)}
    sharded = [fqn for fqn, linear in linears.items() if isinstance(linear.weight, DTensor)]
    if sharded:
        raise ValueError(
            f"{sharded[0]} is sharded: load the checkpoint into an unsharded model, and convert that"
        )
    for m in grouped_modules(module).values():
        if isinstance(m.product, Float8GroupedMM) and m.product.high_precision is not None:
            m.product = m.product.high_precision  # type: ignore[assignment]
    plain = {id(linear): linear.to_float() for linear in linears.values()}
    return _swap(module, "", lambda linear, fqn: plain.get(id(linear)))


# ------------------------------------------------------------------------------------------ automatic filters


@dataclass(frozen=True)
class Threshold:
    """Linears with at most `K` input and `N` output features lose time in float8 (None: any number)."""

    K: int | None
    N: int | None

    def holds(self, K: int, N: int) -> bool:
        return (self.K is None or K <= self.K) and (self.N is None or N <= self.N)


# From torchao's published measurements on an H100, so that the same layers are converted.
_ONE_SCALE = (Threshold(4096, 1024),)
_FINER_SCALES = (Threshold(None, 2048), Threshold(1024, None), Threshold(2048, 4096))


def too_small(recipe: Recipe) -> tuple[Threshold, ...]:
    """The sizes of linears that lose time in `recipe`.

    Measured for tensorwise and rowwise. Of finer scales the casts cost as much as rowwise's or more, and the
    products are no faster: the same limits.
    """
    cast = recipe.output.a
    return _ONE_SCALE if cast is not None and cast.block == (FULL, FULL) else _FINER_SCALES


@dataclass(frozen=True)
class AutoFilter:
    """A `module_filter_fn` that excludes linears that float8 would not speed up. See `why_not`."""

    recipe: str
    filter_fqns: tuple[str, ...] = ()

    def __call__(self, module: nn.Module, fqn: str) -> bool:
        return self.why_not(module, fqn) is None

    def why_not(self, module: nn.Module, fqn: str) -> str | None:
        """Why the module named `fqn` stays in high precision, or None if it is converted."""
        if not isinstance(module, nn.Linear):
            return f"{fqn} is a {type(module).__name__}, not an nn.Linear"
        for part in self.filter_fqns:
            if part in fqn:
                return f"{fqn} matches {part!r} of filter_fqns"
        N, K = module.weight.shape
        if K % 16 or N % 16:
            return f"{fqn} is {K} to {N} features, not multiples of 16: it would be padded at every use"
        for limit in too_small(find_recipe(self.recipe)):
            if limit.holds(K, N):
                return f"{fqn} is {K} to {N} features, too small to gain from {self.recipe}"
        return None


def auto_filter_for_recipe(
    recipe: str | Float8LinearRecipeName, filter_fqns: Sequence[str] = ()
) -> AutoFilter:
    """A `module_filter_fn` for the recipe: converts linears that gain from float8 on an H100, and whose fully
    qualified name contains none of `filter_fqns`. Raises ValueError for an unknown recipe.
    """
    name = recipe.value if isinstance(recipe, Float8LinearRecipeName) else recipe
    if isinstance(filter_fqns, str):
        raise TypeError(f"filter_fqns is the string {filter_fqns!r}: give a list, [{filter_fqns!r}]")
    return AutoFilter(find_recipe(name).name, tuple(filter_fqns))
