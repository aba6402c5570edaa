"""Activation checkpointing of one layer: trade compute in backward for memory.

none: keep every activation. full: keep only the layer's input and rerun its forward in backward. selective,
"op": rerun the forward, but keep the results of attention and of every second matrix product (keeping all
products would save little memory). selective, "n": full for every n-th layer, none for the rest. (Chen et
al., arXiv:1604.06174.)

A layer that chooses (a router, which has the attribute `chooses`) keeps its choice under every policy:
recomputed in a compiled graph, scores differ by rounding, and another choice would give other gradients.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from octavo.config.schema import ActivationCheckpoint

_aten = torch.ops.aten

_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
# By name, because the operators of emulated float8 GEMMs exist only once octavo.float8 is loaded.
_MATMULS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_mm",
        "octavo::scaled_mm_blocks",
        "octavo::mm_codes",
        "octavo::grouped_mm",
        "octavo::grouped_mm_float8",
    }
)
_CHOICES = frozenset({_aten.topk.default})


def _selective_contexts() -> Any:
    """Contexts for one forward and its recomputation; each counts its own matrix products."""
    counts = {False: 0, True: 0}  # by whether this is the recomputation

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op.name() in _MATMULS:
            counts[ctx.is_recompute] += 1
            keep = counts[ctx.is_recompute] % 2 == 1
        else:
            keep = op in _ATTENTION or op in _CHOICES
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _choosing_contexts() -> Any:
    """Contexts that keep only choices."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _CHOICES else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _full(layer: nn.Module) -> nn.Module:
    if any(getattr(module, "chooses", False) for module in layer.modules()):
        return checkpoint_wrapper(layer, preserve_rng_state=False, context_fn=_choosing_contexts)
    return checkpoint_wrapper(layer, preserve_rng_state=False)


def _selective(layer: nn.Module) -> nn.Module:
    return checkpoint_wrapper(layer, preserve_rng_state=False, context_fn=_selective_contexts)


def checkpoint_layer(layer: nn.Module, settings: ActivationCheckpoint, number: int) -> nn.Module:
    """`layer`, wrapped as `settings` ask; `number` is its index in the model, from 0."""
    if settings.mode == "none":
        return layer
    if settings.mode == "full":
        return _full(layer)
    if settings.selective_ac_option == "op":
        return _selective(layer)
    every = int(settings.selective_ac_option)
    return _full(layer) if number % every == 0 else layer
