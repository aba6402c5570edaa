"""Residual addition, RMSNorm, cast, and the linears that follow, in one read and one write of each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.float8.casts.producer_maxima import kernels_support, maxima_as_gradients
from octavo.float8.fused.shared_input import SharedInput, has_hooks
from octavo.float8.product import Product

WIDEST = 8192
"""The longest row that the kernel can hold."""


class _AddNorm(torch.autograd.Function):
    """`x[M, K], residual[M, K], w[K] -> h, y, maxima of y's rows and columns`.

    `rows` and `columns` receive, as gradients, the maxima of x's gradient (`casts/producer_maxima.py`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        w: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from octavo.float8.kernels import ops

        h, rms, y, y_rows, y_columns = ops.add_rms_norm_with_maxima(x, residual, w, eps)
        ctx.save_for_backward(h, rms, w)
        ctx.mark_non_differentiable(y_rows, y_columns)
        ctx.wants_maxima = rows is not None
        return h, y, y_rows, y_columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from octavo.float8.kernels import ops

        h, rms, w = ctx.saved_tensors
        dh, dy = (grad.contiguous() for grad in grads[:2])
        dx, rows, columns, dw = ops.add_rms_norm_backward_with_maxima(dy, dh, h, rms, w)
        maxima = maxima_as_gradients((rows, columns)) if ctx.wants_maxima else (None, None)
        return dx, dx, dw.to(w.dtype), *maxima, None


class _Norm(torch.autograd.Function):
    """`x[M, K], w[K] -> x, y, maxima of y's rows and columns`. x passes through, so that the gradient of the
    stream reaches the kernel, which adds it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from octavo.float8.kernels import ops

        rms, y, rows, columns = ops.rms_norm_with_maxima(x, w, eps)
        ctx.save_for_backward(x, rms, w)
        ctx.mark_non_differentiable(rows, columns)
        return x.view_as(x), y, rows, columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from octavo.float8.kernels import ops

        x, rms, w = ctx.saved_tensors
        dh, dy = (grad.contiguous() for grad in grads[:2])
        dx, _, _, dw = ops.add_rms_norm_backward_with_maxima(dy, dh, x, rms, w)
        return dx, dw.to(w.dtype), None


class NormedInput:
    """Computes `h = x + residual; n = norm(h); [linear(n) for linear in linears]`.

    norm: an `nn.RMSNorm` over the last dimension, with a weight. linears, shared_scales: as in `SharedInput`.
    """

    def __init__(self, norm: nn.Module, linears: Sequence[nn.Linear], *, shared_scales: bool = False) -> None:
        self.norm = norm
        self.shared = SharedInput(linears, shared_scales=shared_scales)

    def __call__(
        self, x: Tensor | Product, residual: Tensor | None = None, *, note_maxima: bool = False
    ) -> tuple[Tensor, tuple[Product, ...]]:
        """`h[..., K]`, and a `Product` for each linear. Without `residual`, h is x."""
        made = x if isinstance(x, Product) else Product(x)
        value = made.value
        if not self._kernel_supports(value, residual):
            h = value if residual is None else value + residual
            return h, self.shared(self.norm(h), note_maxima=note_maxima)
        norm = self.norm
        assert isinstance(norm, nn.RMSNorm)
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        shape = value.shape
        flat = value.reshape(math.prod(shape[:-1]), shape[-1]).contiguous()
        if residual is None:
            h, y, rows, columns = _Norm.apply(flat, norm.weight, eps)
        else:
            stream = residual.reshape(flat.shape).contiguous()
            h, y, rows, columns = _AddNorm.apply(flat, stream, norm.weight, made.rows, made.columns, eps)
        products = self.shared(y.reshape(shape), maxima=(rows, columns), note_maxima=note_maxima)
        return h.reshape(shape), products

    def _kernel_supports(self, x: Tensor, residual: Tensor | None) -> bool:
        norm = self.norm
        if type(norm) is not nn.RMSNorm or norm.weight is None or has_hooks(norm):
            return False
        if isinstance(norm.weight, DTensor) or not kernels_support(x):
            return False
        if norm.eps is None and x.dtype != torch.float32:  # its meaning depends on PyTorch's version
            return False
        same = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
        return same and norm.normalized_shape == x.shape[-1:] and x.shape[-1] <= WIDEST
