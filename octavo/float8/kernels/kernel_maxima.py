"""A tensor `[M, K]` written in tiles, and the maxima of its rows and columns that casting it will ask for.

What makes a tensor sees every element of it, so the maxima cost nothing there, and save
`cast_given_maxima.py` a read. They are of what was rounded, so that the cast is that of the tensor as it
stands in memory. A program holds a tile of TILE_M x TILE_K and notes one maximum for each of its rows and
columns; whoever casts takes the maximum of those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.numerics import magnitude, rounded, to_float32

# The size of a tile decides how many maxima there are, so timing may not.
TILE_M, TILE_K = 32, 128

Made = tuple[Tensor, Tensor, Tensor]
"""A tensor `[M, K]`, and maxima `[any, M]` of its rows, `[any, K]` of its columns, int32 bits of float32."""


@triton.jit
def store_with_maxima(value, out_ptr, rows_ptr, columns_ptr, m, k, M, K, mask, pid_m, pid_k):
    """Round float32 `value`, the tile (pid_m, pid_k) of rows m and columns k, and store it with its
    maxima.
    """
    value = rounded(value, out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * K + k[None, :], value, mask=mask)
    bits = magnitude(to_float32(value))
    bits = tl.where(mask, bits, 0)
    tl.store(rows_ptr + pid_k.to(tl.int64) * M + m, tl.max(bits, axis=1), mask=m < M)
    tl.store(columns_ptr + pid_m.to(tl.int64) * K + k, tl.max(bits, axis=0), mask=k < K)


def grid_of(M: int, K: int) -> tuple[int, int]:
    """The programs that write `[M, K]`."""
    return triton.cdiv(M, TILE_M), triton.cdiv(K, TILE_K)


def empty_with_maxima(like: Tensor, M: int, K: int) -> Made:
    """Room for a tensor `[M, K]` of the dtype of `like`, and its maxima."""
    tiles_m, tiles_k = grid_of(M, K)
    rows = like.new_empty((tiles_k, M), dtype=torch.int32)
    columns = like.new_empty((tiles_m, K), dtype=torch.int32)
    return like.new_empty((M, K)), rows, columns
