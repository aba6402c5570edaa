"""Casts with one scale for each square of SIDE x SIDE elements, in one read of x.

A program casts one square. A cast by squares commutes with transposing, so the transposed copy costs one byte
per element to write and nothing to compute; its scales are `scale` transposed. Squares at the edges are
smaller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.kernel_launch import (
    Config,
    Destination,
    cast_constants,
    empty_codes,
    empty_scale,
    tuned,
)
from octavo.float8.kernels.numerics import magnitude, scales_of, to_float8, to_float32

CONFIGS: tuple[Config, ...] = (
    {"num_warps": 8, "num_stages": 1},
    {"num_warps": 16, "num_stages": 1},
)


@tuned(CONFIGS, key=["M", "K", "ROWS", "COLUMNS"])
@triton.jit
def _cast_tiles(
    x_ptr, data_ptr, data_t_ptr, scale_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    k = pid_k.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    s, scale = scales_of(tl.max(tl.max(magnitude(x), axis=1), axis=0), MANTISSA, SCALES)
    tl.store(scale_ptr + pid_m * tl.cdiv(K, SIDE) + pid_k, scale)
    code = to_float8(x * s, MANTISSA)
    if ROWS:
        tl.store(data_ptr + m[:, None] * K + k[None, :], code, mask=mask)
    if COLUMNS:
        tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


def cast_tiles(
    x: Tensor, side: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool,
    out: Destination | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`data`, `data_t` and `scale[M / side, K / side]`; `side` is a power of two."""
    M, K = x.shape
    grid = (triton.cdiv(M, side), triton.cdiv(K, side))
    data, data_t = empty_codes(x, rows and out is None, columns)
    data, scale = out or (data, empty_scale(x, grid, scales))
    _cast_tiles[grid](
        x, data, data_t, scale, M, K,
        ROWS=rows, COLUMNS=columns, SIDE=side, **cast_constants(dtype, scales),
    )  # fmt: skip
    return data.view(dtype), data_t.view(dtype), scale
