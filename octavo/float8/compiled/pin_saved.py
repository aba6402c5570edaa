"""Keeping float8 casts for backward in compiled code.

Between forward and backward the compiler keeps whatever is smallest, and recomputes the rest. Left alone it
keeps a Llama block's bfloat16 residual stream and recomputes norm, maxima and cast in backward: nothing is
kept in float8, and every input is read and cast twice. `keep` makes a cast a thing of the forward pass: it
tells the compiler that the tensors are changed in place (they are not), so that what later code reads exists
only from here on, and may not be computed again. It costs no copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.float8.casts.input_cache import Casts
from octavo.float8.quantize import Quantized, transposed


@torch.library.custom_op("octavo::keep", mutates_args=("tensors",))
def _keep(tensors: list[Tensor]) -> None:
    """Nothing."""


@_keep.register_fake
def _(tensors: list[Tensor]) -> None:
    return None


def keep(casts: Casts, *, one_cast: bool) -> Casts:
    """`casts` as compiled code keeps them. `one_cast`: both are the same cast, of the tensor and of its
    transpose.
    """
    row, col = casts
    if row is None or col is None:
        return casts
    # A kernel writes the transpose out; else it is the same memory, seen otherwise.
    if one_cast and col.data.stride() == row.data.t().stride():
        _keep([row.data, row.scale])
        return row, transposed(row)
    if one_cast:
        _keep([row.data, row.scale, col.data])
        return row, Quantized(col.data, row.scale.t())
    if col.data.is_contiguous():
        _keep([row.data, row.scale, col.data, col.scale])
        return row, col
    data = col.data.t()  # as it lies in memory
    _keep([row.data, row.scale, data, col.scale])
    return row, Quantized(data.t(), col.scale)
