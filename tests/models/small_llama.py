"""Tiny Llamas that run in milliseconds, one for each variant of the family."""

from dataclasses import replace

import torch

from octavo import models
from octavo.families import ModelArgs
from octavo.families.model_args import LatentArgs, MoEArgs, RopeScaling, Yarn
from octavo.models.transformer import Transformer

# A short original context, so that low, blended and high frequencies all occur within 48 positions.
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)


SPEC = models.get("llama3")
FLAVORS = SPEC.flavors


def small(**changes) -> ModelArgs:
    args = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 131}
    return ModelArgs(**{**args, "max_seq_len": 48, **changes})


SHAPES = {
    "gqa": small(),
    "mha": small(n_kv_heads=8),
    "3.1": small(rope_scaling=SCALING),
    "tied": small(tie_embeddings=True, rope_scaling=SCALING),
    "mqa": small(n_heads=4, n_kv_heads=1, rope_theta=10_000.0),
}


LATENT = {"norm_eps": 1e-6, "rope_theta": 1e4, "n_kv_heads": 8}
SIGMOID = MoEArgs(8, 2, 24, 1, 1, "sigmoid", True, 2.5, bias=True, balance_loss=1e-4)
QWEN3 = {"norm_eps": 1e-6, "qk_norm": True, "rope_theta": 1e6}
SMALL: dict[str, tuple[str, ModelArgs]] = {
    **{f"llama3 {shape}": ("llama3", args) for shape, args in SHAPES.items()},
    "qwen3": ("qwen3", small(**QWEN3, head_dim=16)),
    "qwen3 experts": ("qwen3", small(**QWEN3, head_dim=16, moe=MoEArgs(6, 2, 24, balance_loss=1e-3))),
    "deepseek_v3": (
        "deepseek_v3",
        small(**LATENT, latent=LatentArgs(32, 40, 12, 8, 10), moe=replace(SIGMOID, groups=4, groups_kept=2)),
    ),
    "deepseek_v3 yarn": (
        "deepseek_v3",
        small(**LATENT, rope_scaling=Yarn(8.0, 4096), latent=LatentArgs(32, None, 8, 16, 8), moe=SIGMOID),
    ),
    "deepseek_v2": (
        "deepseek_v3",
        small(
            **LATENT,
            rope_scaling=Yarn(4.0, 16, mscale=0.707),
            latent=LatentArgs(32, None, 12, 8, 12),
            moe=MoEArgs(8, 2, 24, 2, 1, "softmax", False, balance_loss=1e-4),
        ),
    ),
    "qwen3 tied": ("qwen3", small(**QWEN3, head_dim=12, tie_embeddings=True)),
}


def noisy(args: ModelArgs, seed: int = 0) -> Transformer:
    """A model with large random weights, so that attention matters."""
    torch.manual_seed(seed)
    model = Transformer(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()
