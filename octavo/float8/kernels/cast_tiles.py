"""`x[M, K]` with one scale for each square of SIDE x SIDE elements, in one read of x.

    data[M, K], scale[M / SIDE, K / SIDE]         and the same cast, transposed:         data_t[K, M]

A program holds one square. A cast by squares commutes with transposing, so the transposed copy costs one more
byte an element to write and nothing to compute; its scales are `scale` transposed. Squares at the edges are
smaller. The reference is `quantize_both` with a block of (SIDE, SIDE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.numerics import (
    MANTISSA_BITS,
    SCALE_FORMATS,
    Config,
    empty_scale,
    magnitude,
    scales_of,
    to_float8,
    to_float32,
    tuned,
    wrap_triton,
)

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
    x: Tensor, side: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`data[M, K]`, `data_t[K, M]` and `scale` of contiguous `x[M, K]`; what is not asked for is empty.

    `side` is a power of two, `scales` a key of `SCALE_FORMATS`.
    """
    M, K = x.shape
    grid = (triton.cdiv(M, side), triton.cdiv(K, side))
    data = x.new_empty((M, K) if rows else (0, 0), dtype=torch.uint8)
    data_t = x.new_empty((K, M) if columns else (0, 0), dtype=torch.uint8)
    scale = empty_scale(x, grid, scales)
    wrap_triton(_cast_tiles)[grid](
        x, data, data_t, scale, M, K,
        MANTISSA=MANTISSA_BITS[dtype], SCALES=SCALE_FORMATS[scales], ROWS=rows, COLUMNS=columns, SIDE=side,
    )  # fmt: skip
    return data.view(dtype), data_t.view(dtype), scale
