"""Tiny Llamas that run in milliseconds, one for each variant of the family."""

import torch

from octavo import models
from octavo.families import ModelArgs
from octavo.families.model_args import MoEArgs, RopeScaling
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


QWEN3 = {"norm_eps": 1e-6, "qk_norm": True, "rope_theta": 1e6}
SMALL: dict[str, tuple[str, ModelArgs]] = {
    **{f"llama3 {shape}": ("llama3", args) for shape, args in SHAPES.items()},
    "qwen3": ("qwen3", small(**QWEN3, head_dim=16)),
    "qwen3 experts": ("qwen3", small(**QWEN3, head_dim=16, moe=MoEArgs(6, 2, 24, balance_loss=1e-3))),
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
