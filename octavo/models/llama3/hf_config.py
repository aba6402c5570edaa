"""`config.json` of Hugging Face's `LlamaForCausalLM`, written from and read into `LlamaArgs`.

Written configs use transformers 4's keys (`rope_theta` and `rope_scaling` side by side), which transformers 5
still reads; both versions' keys are read. Options that our model does not implement (biases, another
activation, another rotary scaling, quantised weights) are refused by name: such weights would load, and the
logits would be wrong.
"""

import math
from collections.abc import Mapping
from typing import Any

from octavo.config import ConfigError
from octavo.models.llama3.model import LlamaArgs, RopeScaling

_FIXED: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "pretraining_tp": 1,
}
"""Keys with the only value that our model implements; only `model_type` must be present."""

_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
}
"""`LlamaArgs` field -> key of config.json, a positive integer."""

_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
"""`RopeScaling` field -> key of `rope_scaling`."""


def to_config(args: LlamaArgs) -> dict[str, Any]:
    """The content of `config.json` for `args`, without token ids and dtype.

    `max_position_embeddings` is `args.max_seq_len`, the sequence length of training.
    """
    scaling = args.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(args, ours) for ours, theirs in _SIZES.items()},
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}},
        "tie_word_embeddings": args.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_config(config: Mapping[str, Any]) -> LlamaArgs:
    """The `LlamaArgs` of a `config.json`.

    Raises:
        ConfigError: a key is missing or of the wrong type, or has a value that this model does not implement.
    """
    for key, supported in _FIXED.items():
        value = config.get(key, None if key == "model_type" else supported)
        if value != supported:
            raise ConfigError(
                f"config.json: {key} is {value!r}; octavo's llama3 implements only {supported!r}, so it "
                "cannot load this model"
            )
    heads = _positive_int(config, "num_attention_heads")
    config = {
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        **{key: value for key, value in config.items() if value is not None},
    }
    sizes: dict[str, Any] = {ours: _positive_int(config, theirs) for ours, theirs in _SIZES.items()}
    args = LlamaArgs(
        **sizes,
        norm_eps=_positive_float(config, "rms_norm_eps", 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False) is True,
        **_rope(config),
    )
    if args.dim % args.n_heads or config.get("head_dim", args.head_dim) != args.head_dim or args.head_dim % 2:
        raise ConfigError(
            f"config.json: head_dim {config.get('head_dim', 'unset')} with hidden_size {args.dim} and "
            f"{args.n_heads} heads; octavo's llama3 needs head_dim = hidden_size / num_attention_heads, an "
            "even number"
        )
    if args.n_heads % args.n_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {args.n_heads} must be a multiple of num_key_value_heads "
            f"{args.n_kv_heads}"
        )
    return args


def _positive_int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ConfigError(f"config.json: {key} is {value!r}; expected an integer, 1 or more")
    return value


def _positive_float(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"config.json: {key} is {value!r}; expected a number above 0")
    return float(value)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of `LlamaArgs`, from the keys of transformers 4 or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {rope!r}; expected an object or null")
    theta = _positive_float({**config, **rope}, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "llama3":
        raise ConfigError(
            f"config.json: rotary scaling of type {kind!r}; octavo's llama3 implements 'llama3' and 'default'"
        )
    scaling: dict[str, Any] = {
        ours: _positive_float(rope, theirs, math.nan) for ours, theirs in _SCALING.items()
    }
    scaling["original_context"] = int(scaling["original_context"])
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**scaling)}
