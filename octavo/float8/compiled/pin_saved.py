"""Pins float8 casts: compiled code saves them for backward rather than recompute them.

Between forward and backward the compiler saves what is smallest and recomputes the rest. By default it saves
a Llama block's bfloat16 residual stream and recomputes norm, maxima and cast in backward: nothing is saved in
float8, and every input is read and cast twice. `pin_saved` declares to the compiler that the casts are
mutated in place (they are not). A mutated tensor cannot be recomputed, so the compiler saves it. No copy is
made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.float8.quantize import Casts, Quantized, transposed


@torch.library.custom_op("octavo::pin_saved", mutates_args=("tensors",))
def _pin(tensors: list[Tensor]) -> None:
    """Does nothing; its declared mutation of `tensors` is the point."""


@_pin.register_fake
def _(tensors: list[Tensor]) -> None:
    return None


def pin_saved(casts: Casts, *, one_cast: bool) -> Casts:
    """The same `casts`, pinned. `one_cast`: both are one square cast, of a tensor and of its transpose."""
    row, col = casts
    if row is None or col is None:
        return casts
    # A kernel writes the transpose out; without kernels it is a view of the same memory.
    if one_cast and col.data.stride() == row.data.t().stride():
        _pin([row.data, row.scale])
        return row, transposed(row)
    if one_cast:
        _pin([row.data, row.scale, col.data])
        return row, Quantized(col.data, row.scale.t())
    if col.data.is_contiguous():
        _pin([row.data, row.scale, col.data, col.scale])
        return row, col
    data = col.data.t()  # contiguous
    _pin([row.data, row.scale, data, col.scale])
    return row, Quantized(data.t(), col.scale)
