"""Casts what a kernel has just written with the maxima that it computed: one read where a cast takes two.

Maxima are `(rows[any, M], columns[any, K])`, the int32 bits of float32 magnitudes. In forward, the producer
passes them to the cast. In backward they must go from the function that produces a gradient to the one that
casts it, and autograd passes only gradients. So a product has two more outputs, `rows[1, M]` and `columns[1,
N]` of zeros, which its consumer takes as inputs and ignores; their gradients are the maxima. This costs M + N
numbers, and compiled code needs no special support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.float8.casts import gpu_cast
from octavo.float8.quantize import Quantized, quantize_both
from octavo.float8.recipe import FULL, Cast

Maxima = tuple[Tensor, Tensor]


def kernels_support(x: Tensor) -> bool:
    """Whether kernels run on the device of `x` and support its dtype."""
    return gpu_cast.supports(x, None)


def maxima_as_gradients(maxima: Maxima) -> Maxima:
    """Maxima as the gradients of a product's `rows` and `columns`."""
    rows, columns = (bits.amax(dim=0, keepdim=True).view(torch.float32) for bits in maxima)
    return rows, columns


def maxima_from_gradients(rows: Tensor | None, columns: Tensor | None) -> Maxima | None:
    """The inverse of `maxima_as_gradients`; None if there are none."""
    if rows is None or columns is None:
        return None
    return rows.view(torch.int32), columns.view(torch.int32)


def quantize_with_maxima(
    x: Tensor, row: Cast | None, col: Cast | None, maxima: Maxima | None
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """`quantize_both(x[M, K], row, col)`, using the maxima of x if they save a pass."""
    given = None if maxima is None else _quantize_by_kernel(x, row, col, maxima)
    return quantize_both(x, row, col) if given is None else given


def _quantize_by_kernel(
    x: Tensor, row: Cast | None, col: Cast | None, maxima: Maxima
) -> tuple[Quantized | Tensor, Quantized | Tensor] | None:
    cast = row or col
    if cast is None or not (gpu_cast.supports(x, row) and gpu_cast.supports(x, col)):
        return None
    from octavo.float8.kernels import ops

    scales = cast.scale.value
    if row == col and cast.block == (1, FULL):
        data, scale, data_t, scale_t = ops.cast_with_maxima(x.contiguous(), *maxima, cast.dtype, scales)
        return Quantized(data, scale), Quantized(data_t, scale_t)
    if cast.block == (FULL, FULL) and (row is None or col is None or row == col):
        largest = maxima[0].amax().reshape(1)
        data, data_t, scale = ops.cast_by_tensor_with_maxima(
            x.contiguous(), largest, cast.dtype, scales, row is not None, col is not None
        )
        one = x if row is None else Quantized(data, scale)
        return one, x.t() if col is None else Quantized(data_t, scale.t())
    return None  # block scales need no pass for maxima
