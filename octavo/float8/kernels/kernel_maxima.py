"""Writing a tensor `[M, K]` in tiles together with the maxima of its rows and columns, for casting it.

The kernel that produces a tensor has every element at hand, so the maxima are free there and save
`cast_given_maxima.py` a read. They are taken after rounding, so the cast equals that of the stored tensor. A
program writes a tile of TILE_M x TILE_K and one maximum for each of its rows and columns; the cast reduces
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.numerics import magnitude, rounded, to_float32

# Fixed, not tuned: the tile size determines the shape of the maxima.
TILE_M, TILE_K = 32, 128

WithMaxima = tuple[Tensor, Tensor, Tensor]
"""A tensor `[M, K]`, and partial maxima `[any, M]` of its rows and `[any, K]` of its columns."""


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
    """The grid of programs that write `[M, K]`."""
    return triton.cdiv(M, TILE_M), triton.cdiv(K, TILE_K)


def empty_with_maxima(like: Tensor, M: int, K: int) -> WithMaxima:
    """An uninitialized tensor `[M, K]` of `like`'s dtype, and its maxima."""
    tiles_m, tiles_k = grid_of(M, K)
    rows = like.new_empty((tiles_k, M), dtype=torch.int32)
    columns = like.new_empty((tiles_m, K), dtype=torch.int32)
    return like.new_empty((M, K)), rows, columns
