"""Adds a bias so that compiled code rounds as eager code does.

The compiler fuses the addition with the product's rounding to bfloat16 and skips the rounding in between, and
it sums the bias's gradient in its own order. On a CPU, where float8 is emulated for checking, both are opaque
operators, so that a layer gives the same bits compiled and eager. On a GPU speed matters more, and they are
fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("octavo::add_bias", mutates_args=())
def _add(y: Tensor, bias: Tensor) -> Tensor:
    return y + bias


@torch.library.custom_op("octavo::sum_to_bias", mutates_args=())
def _sum(dy: Tensor) -> Tensor:
    return dy.sum(dim=list(range(dy.dim() - 1))) if dy.dim() > 1 else dy.clone()


@_add.register_fake
def _(y: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(y)


@_sum.register_fake
def _(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[-1])


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return _add(y, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = grads
        return dy, _sum(dy)


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """`y[..., N] + bias[N]` in y's dtype."""
    bias = bias.to(y.dtype)
    if torch.compiler.is_compiling() and y.device.type == "cpu":
        return _AddBias.apply(y, bias)
    return y + bias
