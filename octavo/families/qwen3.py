"""Qwen3 (arXiv:2505.09388): heads of 128 whatever the width, and a norm of each head of q and k before the
rotation. The sizes are those of the published configurations.
"""

import re
from dataclasses import replace

from octavo.families.family import LAYER, ROTATED, SIZES, Family, HubFormat
from octavo.families.model_args import ModelArgs


def _args(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int) -> ModelArgs:
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden_dim=hidden_dim,
        head_dim=128,
        vocab_size=151_936,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        max_seq_len=40_960,
    )


_TIED = {
    "0.6B": _args(1024, 28, 16, 8, 3072),
    "1.7B": _args(2048, 28, 16, 8, 6144),
    "4B": _args(2560, 36, 32, 8, 9728),
}

_HUB_FORMAT = HubFormat(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "quantization_config": None,
    },
    written={"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True},
    sizes={**SIZES, "head_dim": "head_dim"},
    variant={"qk_norm": True},
    layer={
        **LAYER,
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
    },
    rotated=(*ROTATED, "attention.q_norm.weight", "attention.k_norm.weight"),
)

FAMILY = Family(
    name="qwen3",
    flavors={
        "debugmodel": replace(_args(256, 6, 8, 4, 768), head_dim=32, vocab_size=0),
        **{name: replace(args, tie_embeddings=True) for name, args in _TIED.items()},
        "8B": _args(4096, 36, 32, 8, 12288),
        "14B": _args(5120, 40, 40, 8, 17408),
        "32B": _args(5120, 64, 64, 8, 25600),
    },
    hub_format=_HUB_FORMAT,
    owner="Qwen",
    repository=re.compile(r"Qwen3-\d+(\.\d+)?B(-Base)?"),
)
