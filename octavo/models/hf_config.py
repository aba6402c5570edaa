"""`config.json` of Hugging Face's transformers, written from and read into `ModelArgs`.

A family's `HubFormat` has the keys. Written configs use transformers 4's keys (`rope_theta` and
`rope_scaling` side by side), which transformers 5 still reads; both versions' keys are read. Options that our
model does not implement (biases, another activation, another rotary scaling, quantised weights) are refused
by name: such weights would load, and the logits would be wrong.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any, get_type_hints

from octavo.config import ConfigError
from octavo.families import Family
from octavo.families.family import HubFormat
from octavo.families.model_args import LatentArgs, ModelArgs, MoEArgs, RopeScaling, Yarn, get
from octavo.models.foreign_config import check_config

_SCALINGS: Mapping[str, tuple[Mapping[str, str], type]] = MappingProxyType(
    {
        "llama3": (
            {
                "factor": "factor",
                "low_freq_factor": "low_freq_factor",
                "high_freq_factor": "high_freq_factor",
                "original_context": "original_max_position_embeddings",
            },
            RopeScaling,
        ),
        "yarn": (
            {
                "factor": "factor",
                "beta_fast": "beta_fast",
                "beta_slow": "beta_slow",
                "mscale": "mscale_all_dim",
                "original_context": "original_max_position_embeddings",
            },
            Yarn,
        ),
    }
)
"""`rope_type` -> (field of ours -> key of `rope_scaling`, our class)."""

_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
_PARTS: Mapping[str, type] = MappingProxyType({"moe": MoEArgs, "latent": LatentArgs})
"""Field of `ModelArgs` -> its class."""


def to_config(family: Family, args: ModelArgs) -> dict[str, Any]:
    """The content of `config.json` for `args`, without token ids and dtype.

    `max_position_embeddings` is `args.max_seq_len`, the sequence length of training.
    """
    stored, scaling = family.format_of(args), args.rope_scaling
    return {
        "architectures": [stored.architecture],
        "model_type": stored.model_type,
        "head_dim": args.rope_width,  # transformers' name for the part that is rotated
        **{theirs: get(args, ours) for ours, theirs in stored.fields.items()},
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": _written_scaling(scaling),
        "tie_word_embeddings": args.tie_embeddings,
        **{key: value for key, value in stored.fixed.items() if value is not None},
        **stored.written,
    }


def from_config(family: Family, config: Mapping[str, Any]) -> ModelArgs:
    """The `ModelArgs` of a `config.json`.

    Raises:
        ConfigError: a key is missing or of the wrong type, or has a value that this model does not implement.
    """
    types = {stored.model_type: stored for stored in family.hub_formats}
    model_type = config.get("model_type")
    stored = types.get(model_type) if isinstance(model_type, str) else None
    if stored is None:
        raise ConfigError(
            f"config.json: model_type is {model_type!r}; octavo's {family.name} implements "
            f"only {' and '.join(map(repr, types))}, so it cannot load this model"
        )
    config = {
        stored.aliases.get(key, key): value for key, value in config.items() if key not in stored.ignored
    }
    if stored.float8:
        config = _without_float8(config)
    for key, supported in stored.fixed.items():
        value = config.get(key, supported)
        if value != supported:
            raise ConfigError(
                f"config.json: {key} is {value!r}; octavo's {family.name} implements only {supported!r}, so "
                "it cannot load this model"
            )
    heads = _positive_int(config, "num_attention_heads")
    config = {
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        **{key: value for key, value in config.items() if value is not None},
    }
    values: dict[str, Any] = {ours: _value(config, ours, theirs) for ours, theirs in stored.fields.items()}
    parts: dict[str, dict[str, Any]] = {"": {}}
    for name, value in {**stored.assumed, **values, **stored.variant}.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    args = ModelArgs(
        **parts.pop(""),
        **{part: _PARTS[part](**inner) for part, inner in parts.items()},
        norm_eps=_positive_float(config, "rms_norm_eps", 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False) is True,
        **_rope(family, stored, config),
    )
    _check_heads(family, args, config.get("head_dim", args.rope_width))
    check_config(config, to_config(family, args))
    return args


def _without_float8(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config` as if the weights were not in float8, which import dequantises."""
    quantized = config.get("quantization_config")
    known = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if isinstance(quantized, Mapping) and all(quantized.get(key) == value for key, value in known.items()):
        return {**config, "quantization_config": None}
    return config


def _value(config: Mapping[str, Any], name: str, key: str) -> int | float:
    """The value of `key` in the type of the field `name` of `ModelArgs`. Within its parts, a field's default
    stands for a key that is missing or null.
    """
    part, _, field = name.rpartition(".")
    owner: type = _PARTS.get(part, ModelArgs)
    default = {one.name: one.default for one in fields(owner)}[field] if part else MISSING
    if default is not MISSING and config.get(key, default) == default:
        return default
    if get_type_hints(owner)[field] is float:
        return _number(config, key, None)
    return _positive_int(config, key)


def _check_heads(family: Family, args: ModelArgs, head_dim: object) -> None:
    derived = not args.head_dim and args.latent is None
    other = derived and (args.dim % args.n_heads or head_dim != args.head_width)
    if other or args.rope_width % 2:
        raise ConfigError(
            f"config.json: head_dim {head_dim} with hidden_size {args.dim} and {args.n_heads} heads; "
            f"octavo's {family.name} needs "
            f"{'head_dim = hidden_size / num_attention_heads, ' if derived else ''}an even number"
        )
    if args.n_heads % args.n_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {args.n_heads} must be a multiple of num_key_value_heads "
            f"{args.n_kv_heads}"
        )


def _positive_int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ConfigError(f"config.json: {key} is {value!r}; expected an integer, 1 or more")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None, *, zero: bool = True) -> float:
    value = config.get(key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ConfigError(
            f"config.json: {key} is {value!r}; expected a number {'of 0 or more' if zero else 'above 0'}"
        )
    return float(value)


def _positive_float(config: Mapping[str, Any], key: str, default: float) -> float:
    return _number(config, key, default, zero=False)


def _rope(family: Family, stored: HubFormat, config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of `ModelArgs`, from the keys of transformers 4 or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {rope!r}; expected an object or null")
    theta = _positive_float({**config, **rope}, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in stored.rope_types:
        raise ConfigError(
            f"config.json: rotary scaling of type {kind!r}; octavo's {family.name} implements "
            f"{' and '.join(map(repr, stored.rope_types))}"
        )
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    keys, made = _SCALINGS[kind]
    scaling: dict[str, Any] = {
        ours: _positive_float(rope, theirs, _DEFAULTS.get(theirs, math.nan)) for ours, theirs in keys.items()
    }
    scaling["original_context"] = int(scaling["original_context"])
    if kind == "yarn" and rope.get("mscale", 1.0) != rope.get("mscale_all_dim", 1.0):
        raise ConfigError(
            f"config.json: mscale is {rope.get('mscale')}, and mscale_all_dim {rope.get('mscale_all_dim')}; "
            f"octavo's {family.name} implements only equal ones"
        )
    return {"rope_theta": theta, "rope_scaling": made(**scaling)}


def _written_scaling(scaling: RopeScaling | Yarn | None) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    for kind, (keys, made) in _SCALINGS.items():
        if isinstance(scaling, made):
            written = {theirs: getattr(scaling, ours) for ours, theirs in keys.items()}
            extra = {"mscale": scaling.mscale} if isinstance(scaling, Yarn) else {}
            return {"rope_type": kind, **written, **extra}
    return None
