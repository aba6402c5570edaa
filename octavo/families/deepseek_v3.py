"""DeepSeek-V3 (arXiv:2412.19437) and its relatives: latent attention, shared experts, dense layers first.

V2-Lite (arXiv:2405.04434) scores by softmax. V3, Moonlight (arXiv:2502.16982) and Kimi K2 score by sigmoid,
choose by score and bias, and renormalise. The sizes are those of the published configurations, without the
layer that predicts several tokens.
"""

import re
from dataclasses import replace

from octavo.families.family import LAYER, SIZES, Family, HubFormat
from octavo.families.model_args import LatentArgs, ModelArgs, MoEArgs, Yarn


def _args(
    dim: int,
    n_layers: int,
    n_heads: int,
    hidden_dim: int,
    moe: MoEArgs,
    *,
    vocab_size: int,
    q_rank: int | None = None,
    rope_theta: float = 10_000.0,
    rope_scaling: Yarn | None = None,
) -> ModelArgs:
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=1e-6,
        latent=LatentArgs(512, q_rank),
        moe=moe,
    )


def _experts(n_experts: int, top_k: int, hidden_dim: int, *, first_dense: int = 1, scale: float) -> MoEArgs:
    return MoEArgs(
        n_experts, top_k, hidden_dim, 1, first_dense, "sigmoid", True, scale, bias=True, balance_loss=1e-4
    )


_V2_LITE = MoEArgs(64, 6, 1408, 2, 1, "softmax", renormalise=False, balance_loss=1e-4)
_V3 = replace(_experts(256, 8, 2048, first_dense=3, scale=2.5), groups=8, groups_kept=4)
_DEBUG = replace(_experts(16, 4, 96, scale=2.5), groups=4, groups_kept=2)

_ATTENTION = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
}
_EXPERTS = {
    "moe.router.weight": "mlp.gate.weight",
    "moe.router.bias": "mlp.gate.e_score_correction_bias",
    "moe.experts.w1": "mlp.experts.{}.gate_proj.weight",
    "moe.experts.w2": "mlp.experts.{}.down_proj.weight",
    "moe.experts.w3": "mlp.experts.{}.up_proj.weight",
    "moe.shared.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "moe.shared.w2.weight": "mlp.shared_experts.down_proj.weight",
    "moe.shared.w3.weight": "mlp.shared_experts.up_proj.weight",
}

_WRITTEN = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}

_FORMAT_V3 = HubFormat(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "quantization_config": None,
    },
    written={**_WRITTEN, "num_nextn_predict_layers": 0},
    fields={
        **SIZES,
        "latent.kv_rank": "kv_lora_rank",
        "latent.q_rank": "q_lora_rank",
        "latent.nope_dim": "qk_nope_head_dim",
        "latent.rope_dim": "qk_rope_head_dim",
        "latent.value_dim": "v_head_dim",
        "moe.n_experts": "n_routed_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.hidden_dim": "moe_intermediate_size",
        "moe.n_shared": "n_shared_experts",
        "moe.first_dense": "first_k_dense_replace",
        "moe.scale": "routed_scaling_factor",
        "moe.groups": "n_group",
        "moe.groups_kept": "topk_group",
    },
    variant={"moe.score": "sigmoid", "moe.renormalise": True, "moe.bias": True},
    assumed={"moe.balance_loss": 1e-4},
    rope_types=("yarn", "default"),
    float8=True,
    extra_layers=True,
    ignored=("num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim", "ep_size", "seq_aux", "auto_map"),
    layer={**LAYER, **_ATTENTION, **_EXPERTS},
    rotated=(),
)
_FORMAT_V2 = replace(
    _FORMAT_V3,
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "quantization_config": None,
    },
    written=_WRITTEN,
    variant={"moe.score": "softmax", "moe.renormalise": False, "moe.bias": False},
)

FAMILY = Family(
    name="deepseek_v3",
    flavors={
        "debugmodel": replace(
            _args(192, 4, 6, 512, _DEBUG, vocab_size=0), latent=LatentArgs(64, 96, 32, 16, 32)
        ),
        "V2-Lite": _args(
            2048, 27, 16, 10944, _V2_LITE, vocab_size=102_400, rope_scaling=Yarn(40.0, mscale=0.707)
        ),
        "Moonlight": _args(
            2048,
            27,
            16,
            11264,
            replace(_experts(64, 6, 1408, scale=2.446), n_shared=2),
            vocab_size=163_840,
            rope_theta=50_000.0,
        ),
        "671B": _args(7168, 61, 128, 18432, _V3, vocab_size=129_280, q_rank=1536, rope_scaling=Yarn(40.0)),
        "K2": _args(
            7168,
            61,
            64,
            18432,
            _experts(384, 8, 2048, scale=2.827),
            vocab_size=163_840,
            q_rank=1536,
            rope_theta=50_000.0,
            rope_scaling=Yarn(64.0, beta_fast=1.0),
        ),
    },
    hub_formats=(_FORMAT_V3, _FORMAT_V2, replace(_FORMAT_V3, model_type="kimi_k2")),
    owner="deepseek-ai",
    repository=re.compile(r"DeepSeek-V[23](-Lite|-Base)?"),
)
