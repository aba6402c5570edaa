"""Llama 3 (arXiv:2407.21783): grouped-query attention and SwiGLU.

A plain size is the current release (8B, 70B and 405B are 3.1; 1B and 3B are 3.2); the suffix `-3.0` is the
same size without rotary scaling. The sizes are those of the published configurations.
"""

import re
from dataclasses import replace

from octavo.families.family import Family, HubFormat
from octavo.families.model_args import ModelArgs, RopeScaling

_LLAMA_3_1 = RopeScaling(factor=8.0)
_LLAMA_3_2 = RopeScaling(factor=32.0)

_SIZES = {
    "8B": ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336),
    "70B": ModelArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672),
    "405B": ModelArgs(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, hidden_dim=53248),
}
_SMALL = {
    "1B": ModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, tie_embeddings=True),
    "3B": ModelArgs(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, hidden_dim=8192, tie_embeddings=True),
}

_HUB_FORMAT = HubFormat(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
        "pretraining_tp": 1,
    },
    written={"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True},
    rope_types=("llama3", "default"),
)

FAMILY = Family(
    name="llama3",
    flavors={
        "debugmodel": ModelArgs(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, hidden_dim=768, vocab_size=0),
        **{name: replace(args, rope_scaling=_LLAMA_3_2) for name, args in _SMALL.items()},
        **{name: replace(args, rope_scaling=_LLAMA_3_1) for name, args in _SIZES.items()},
        **{f"{name}-3.0": args for name, args in _SIZES.items()},
    },
    hub_formats=(_HUB_FORMAT,),
    owner="meta-llama",
    repository=re.compile(r"(Meta-)?Llama-\d(\.\d)?-\d+B(-\w+)*", re.IGNORECASE),
)
