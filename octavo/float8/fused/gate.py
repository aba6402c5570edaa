"""SwiGLU (arXiv:2002.05202), cast, and the linear that follows, in one read and one write of each tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.float8.casts.producer_maxima import kernels_support, maxima_as_gradients, quantize_with_maxima
from octavo.float8.fused.shared_input import Remake, SharedInput
from octavo.float8.product import Product
from octavo.float8.quantize import Quantized
from octavo.float8.recipe import Recipe


class _SwiGLU(torch.autograd.Function):
    """`a[M, K], b[M, K] -> silu(a) * b, maxima of its rows and columns`.

    The other four arguments receive, as gradients, the maxima of a's and b's gradients
    (`casts/producer_maxima.py`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        a_rows: Tensor | None,
        a_columns: Tensor | None,
        b_rows: Tensor | None,
        b_columns: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from octavo.float8.kernels import ops

        h, rows, columns = ops.silu_mul_with_maxima(a, b)
        ctx.save_for_backward(a, b)
        ctx.mark_non_differentiable(rows, columns)
        ctx.wants_maxima = a_rows is not None, b_rows is not None
        return h, rows, columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from octavo.float8.kernels import ops

        a, b = ctx.saved_tensors
        made = ops.silu_mul_backward_with_maxima(grads[0].contiguous(), a, b)
        of_a = maxima_as_gradients((made[1], made[2])) if ctx.wants_maxima[0] else (None, None)
        of_b = maxima_as_gradients((made[4], made[5])) if ctx.wants_maxima[1] else (None, None)
        return made[0], made[3], *of_a, *of_b


def _make_again(recipe: Recipe, a: Tensor, b: Tensor, dy: Tensor) -> Quantized | Tensor:
    """The product's operand for grad_weight, of `silu(a) * b`."""
    from octavo.float8.kernels import ops

    h, *maxima = ops.silu_mul_again_with_maxima(a, b, dy)
    cast = recipe.grad_weight.b
    return quantize_with_maxima(h, cast, cast, (maxima[0], maxima[1]))[1]


def _rows_of(*tensors: Tensor) -> list[Tensor]:
    """Each `x[..., K]` as `[M, K]` with contiguous rows and one stride for all: views if possible."""
    flat = [x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in tensors]
    are_rows = all(x.stride(1) == 1 and x.stride(0) >= x.shape[1] for x in flat)
    if are_rows and len({x.stride() for x in flat}) == 1:
        return flat
    return [x.contiguous() for x in flat]


class GatedLinear:
    """Computes `linear(silu(gate) * up)`.

    recompute: keep no cast of the linear's input for backward, which makes it again from gate and up: less
    memory, more traffic, the same bits. Without effect where kernels are not supported.
    """

    def __init__(self, linear: nn.Linear, *, recompute: bool = False) -> None:
        self.shared, self.recompute = SharedInput([linear]), recompute

    def __call__(self, gate: Tensor | Product, up: Tensor | Product, *, note_maxima: bool = False) -> Product:
        """The linear's output for `gate[..., K]` and `up[..., K]`."""
        a, b = (x if isinstance(x, Product) else Product(x) for x in (gate, up))
        same = (a.value.dtype, a.value.shape) == (b.value.dtype, b.value.shape)
        if not kernels_support(a.value) or not same:
            (made,) = self.shared(F.silu(a.value) * b.value, note_maxima=note_maxima)
            return made
        flat = _rows_of(a.value, b.value)
        h, rows, columns = _SwiGLU.apply(*flat, a.rows, a.columns, b.rows, b.columns)
        (made,) = self.shared(
            h.reshape(a.value.shape),
            maxima=(rows, columns),
            note_maxima=note_maxima,
            remake=Remake(_make_again, (flat[0].detach(), flat[1].detach())) if self.recompute else None,
        )
        return made
