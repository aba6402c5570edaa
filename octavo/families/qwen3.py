"""Qwen3 (arXiv:2505.09388): heads of 128 whatever the width, and a norm of each head of q and k before the
rotation; from 30B-A3B on with 128 experts, of which 8 serve a token. The sizes are those of the published
configurations.
"""

import re
from dataclasses import replace

from octavo.families.family import LAYER, ROTATED, SIZES, Family, HubFormat
from octavo.families.model_args import ModelArgs, MoEArgs


def _args(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int, moe: MoEArgs | None = None
) -> ModelArgs:
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
        moe=moe,
        max_seq_len=40_960,
    )


def _experts(hidden_dim: int, n_experts: int = 128, top_k: int = 8) -> MoEArgs:
    return MoEArgs(n_experts, top_k, hidden_dim, score="softmax", renormalise=True, balance_loss=1e-3)


_TIED = {
    "0.6B": _args(1024, 28, 16, 8, 3072),
    "1.7B": _args(2048, 28, 16, 8, 6144),
    "4B": _args(2560, 36, 32, 8, 9728),
}

_NORMS = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}
_WRITTEN = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}

_DENSE = HubFormat(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed=_FIXED,
    written=_WRITTEN,
    fields={**SIZES, "head_dim": "head_dim"},
    variant={"qk_norm": True},
    layer={**LAYER, **_NORMS},
    rotated=(*ROTATED, *_NORMS),
)
_MOE = replace(
    _DENSE,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fixed={**_FIXED, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    fields={
        **_DENSE.fields,
        "moe.n_experts": "num_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.hidden_dim": "moe_intermediate_size",
        "moe.balance_loss": "router_aux_loss_coef",
    },
    aliases={"num_local_experts": "num_experts"},
    variant={"qk_norm": True, "moe.score": "softmax", "moe.renormalise": True},
    layer={
        **{ours: theirs for ours, theirs in LAYER.items() if not ours.startswith("feed_forward")},
        **_NORMS,
        "moe.router.weight": "mlp.gate.weight",
        "moe.experts.w1": "mlp.experts.{}.gate_proj.weight",
        "moe.experts.w2": "mlp.experts.{}.down_proj.weight",
        "moe.experts.w3": "mlp.experts.{}.up_proj.weight",
    },
)

FAMILY = Family(
    name="qwen3",
    flavors={
        "debugmodel": replace(_args(256, 6, 8, 4, 768), head_dim=32, vocab_size=0),
        "debugmodel_moe": replace(
            _args(192, 4, 6, 2, 512, _experts(128, n_experts=16, top_k=4)), head_dim=32, vocab_size=0
        ),
        **{name: replace(args, tie_embeddings=True) for name, args in _TIED.items()},
        "8B": _args(4096, 36, 32, 8, 12288),
        "14B": _args(5120, 40, 40, 8, 17408),
        "32B": _args(5120, 64, 64, 8, 25600),
        "30B-A3B": _args(2048, 48, 32, 4, 6144, _experts(768)),
        "235B-A22B": _args(4096, 94, 64, 4, 12288, _experts(1536)),
    },
    hub_formats=(_DENSE, _MOE),
    owner="Qwen",
    repository=re.compile(r"Qwen3-\d+(\.\d+)?B(-A\d+B)?(-Base)?"),
)
