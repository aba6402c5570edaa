"""Casts with one scale for each GROUP elements along a row, along a column, or both, in one read of x.

    along rows       data[M, K],   scale[M, K / GROUP]
    along columns    data_t[K, M], scale_t[K, M / GROUP]       the cast of x transposed

GROUP is 128 with float32 scales (DeepSeek-V3), or 32 with one-byte scales (MXFP8). A program works through
whole groups in both directions, so one read and two written bytes per element serve both products that read
an operand. It goes through its rows twice, a few at a time: for the rows' casts and the columns' maxima, then
for the columns' casts, out of the cache. Holding 128 x 128 elements instead takes most of a processor's
registers, and leaves nothing to run while it waits for memory.
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

# TILE_M rows are held at a time; a tile is as wide as whole groups along its rows.
CONFIGS: tuple[Config, ...] = (
    {"TILE_M": 32, "TILE_K": 128, "num_warps": 8, "num_stages": 1},
    {"TILE_M": 32, "TILE_K": 128, "num_warps": 4, "num_stages": 1},
    {"TILE_M": 64, "TILE_K": 128, "num_warps": 8, "num_stages": 1},
    {"TILE_M": 32, "TILE_K": 256, "num_warps": 8, "num_stages": 1},
)


def _tile(config: Config, given: Config) -> tuple[int, int]:
    return min(config["TILE_M"], given["GROUP"]) if given["COLUMNS"] else config["TILE_M"], config["TILE_K"]


@tuned(CONFIGS, key=["M", "K", "ROWS", "COLUMNS", "GROUP"], alike=_tile)
@triton.jit
def _cast_lines(
    x_ptr, data_ptr, scale_ptr, data_t_ptr, scale_t_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    # A program casts one group of rows, or TILE_M rows if columns are not grouped.
    BLOCK_M: tl.constexpr = GROUP if COLUMNS else TILE_M
    STEP: tl.constexpr = TILE_M if TILE_M < BLOCK_M else BLOCK_M
    along: tl.constexpr = TILE_K // GROUP
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    first = pid_m.to(tl.int64) * BLOCK_M
    k = pid_k.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    down = tl.zeros((TILE_K,), tl.int32)
    for start in tl.range(0, BLOCK_M, STEP):
        m = first + start + tl.arange(0, STEP)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
        if ROWS:
            groups = tl.reshape(x, (STEP, along, GROUP))
            s, scale = scales_of(tl.max(magnitude(groups), axis=2), MANTISSA, SCALES)
            code = tl.reshape(to_float8(groups * s[:, :, None], MANTISSA), (STEP, TILE_K))
            tl.store(data_ptr + m[:, None] * K + k[None, :], code, mask=mask)
            group = pid_k * along + tl.arange(0, along)
            width = tl.cdiv(K, GROUP)
            inside = (m < M)[:, None] & (group < width)[None, :]
            tl.store(scale_ptr + m[:, None] * width + group[None, :], scale, mask=inside)
        if COLUMNS:
            down = tl.maximum(down, tl.max(magnitude(x), axis=0))
    if COLUMNS:
        s, scale = scales_of(down, MANTISSA, SCALES)
        tl.store(scale_t_ptr + k * tl.cdiv(M, GROUP) + pid_m, scale, mask=k < K)
        for start in tl.range(0, BLOCK_M, STEP):  # from the cache
            m = first + start + tl.arange(0, STEP)
            mask = (m < M)[:, None] & (k < K)[None, :]
            x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
            code = to_float8(x * s[None, :], MANTISSA)
            tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


def cast_lines(
    x: Tensor, group: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool,
    out: Destination | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`data`, `scale[M, K / group]`, `data_t` and `scale_t[K, M / group]`; `group` is a power of two."""
    M, K = x.shape
    data, data_t = empty_codes(x, rows and out is None, columns)
    scale = empty_scale(x, (M, triton.cdiv(K, group)) if rows and out is None else (0, 0), scales)
    data, scale = out or (data, scale)
    scale_t = empty_scale(x, (K, triton.cdiv(M, group)) if columns else (0, 0), scales)

    def grid(meta: Config) -> tuple[int, int]:
        return triton.cdiv(M, group if columns else meta["TILE_M"]), triton.cdiv(K, meta["TILE_K"])

    _cast_lines[grid](
        x, data, scale, data_t, scale_t, M, K,
        ROWS=rows, COLUMNS=columns, GROUP=group, **cast_constants(dtype, scales),
    )  # fmt: skip
    return data.view(dtype), scale, data_t.view(dtype), scale_t
