"""A Llama's `config.json`, written for and read from Hugging Face's `LlamaForCausalLM`.

What is written uses the names that transformers 4 knows and 5 still reads (`rope_theta` and `rope_scaling`
beside each other); both spellings are read. What our model cannot compute (biases, another activation,
another kind of rotary scaling, quantised weights) is refused by name: weights of the right shapes would
load, and the logits would be wrong.
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
"""Keys with the one value that our model computes; a file may leave all but the first out."""

_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
}
"""`LlamaArgs` -> config.json, positive whole numbers."""

_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
"""`RopeScaling` -> the keys of `rope_scaling`."""


def to_config(args: LlamaArgs) -> dict[str, Any]:
    """`config.json` of the model of these sizes, without token ids and dtype.

    `max_position_embeddings` is the longest sequence that the model was trained on, `args.max_seq_len`.
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
    """The sizes that `config.json` tells.

    Raises:
        ConfigError: a key is missing or of the wrong kind, or asks for what this model does not compute.
    """
    for key, only in _FIXED.items():
        value = config.get(key, None if key == "model_type" else only)
        if value != only:
            raise ConfigError(
                f"config.json: {key} is {value!r}; octavo's llama3 computes {only!r} alone, so this is "
                "another model"
            )
    heads = _whole(config, "num_attention_heads")
    config = {
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        **{key: value for key, value in config.items() if value is not None},
    }
    sizes: dict[str, Any] = {ours: _whole(config, theirs) for ours, theirs in _SIZES.items()}
    args = LlamaArgs(
        **sizes,
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False) is True,
        **_rope(config),
    )
    if args.dim % args.n_heads or config.get("head_dim", args.head_dim) != args.head_dim or args.head_dim % 2:
        raise ConfigError(
            f"config.json: head_dim {config.get('head_dim', 'unset')} with hidden_size {args.dim} and "
            f"{args.n_heads} heads; octavo's llama3 has heads of hidden_size / num_attention_heads, an even "
            "number"
        )
    if args.n_heads % args.n_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {args.n_heads} is no multiple of num_key_value_heads "
            f"{args.n_kv_heads}"
        )
    return args


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ConfigError(f"config.json: {key} is {value!r}; expected a whole number from 1 up")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fine or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"config.json: {key} is {value!r}; expected a number above 0")
    return float(value)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of `LlamaArgs`, from either spelling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {rope!r}; expected an object or null")
    theta = _number({**config, **rope}, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "llama3":
        raise ConfigError(
            f"config.json: rotary scaling of type {kind!r}; octavo's llama3 computes 'llama3' and 'default'"
        )
    numbers: dict[str, Any] = {ours: _number(rope, theirs, math.nan) for ours, theirs in _SCALING.items()}
    numbers["original_context"] = int(numbers["original_context"])
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**numbers)}
