"""Casts with one scale for each GROUP elements along a row, along a column, or both, in one read of x.

    along rows       data[M, K],   scale[M, K / GROUP]
    along columns    data_t[K, M], scale_t[K, M / GROUP]       the cast of x transposed

GROUP is 128 with float32 scales (DeepSeek-V3), or 32 with one-byte scales (MXFP8). A tile holds whole groups
in both directions, so one read and two written bytes per element serve both products that read an operand.
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

# Tiles in elements; raised to one group where a group is longer.
CONFIGS: tuple[Config, ...] = (
    {"TILE_M": 64, "TILE_K": 64, "num_warps": 8, "num_stages": 1},
    {"TILE_M": 64, "TILE_K": 128, "num_warps": 8, "num_stages": 1},
    {"TILE_M": 128, "TILE_K": 64, "num_warps": 8, "num_stages": 1},
    {"TILE_M": 128, "TILE_K": 128, "num_warps": 16, "num_stages": 1},
)


@tuned(CONFIGS, key=["M", "K", "ROWS", "COLUMNS", "GROUP"])
@triton.jit
def _cast_lines(
    x_ptr, data_ptr, scale_ptr, data_t_ptr, scale_t_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    # Only the axes that are grouped need whole groups.
    BLOCK_M: tl.constexpr = GROUP if COLUMNS and GROUP > TILE_M else TILE_M
    BLOCK_K: tl.constexpr = GROUP if ROWS and GROUP > TILE_K else TILE_K
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    if ROWS:
        along: tl.constexpr = BLOCK_K // GROUP
        groups = tl.reshape(x, (BLOCK_M, along, GROUP))
        s, scale = scales_of(tl.max(magnitude(groups), axis=2), MANTISSA, SCALES)
        code = tl.reshape(to_float8(groups * s[:, :, None], MANTISSA), (BLOCK_M, BLOCK_K))
        tl.store(data_ptr + m[:, None] * K + k[None, :], code, mask=mask)
        group = pid_k * along + tl.arange(0, along)
        width = tl.cdiv(K, GROUP)
        inside = (m < M)[:, None] & (group < width)[None, :]
        tl.store(scale_ptr + m[:, None] * width + group[None, :], scale, mask=inside)
    if COLUMNS:
        down: tl.constexpr = BLOCK_M // GROUP
        groups = tl.reshape(x, (down, GROUP, BLOCK_K))
        s, scale = scales_of(tl.max(magnitude(groups), axis=1), MANTISSA, SCALES)
        code = tl.reshape(to_float8(groups * s[:, None, :], MANTISSA), (BLOCK_M, BLOCK_K))
        tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))
        group = pid_m * down + tl.arange(0, down)
        height = tl.cdiv(M, GROUP)
        inside = (k < K)[:, None] & (group < height)[None, :]
        tl.store(scale_t_ptr + k[:, None] * height + group[None, :], tl.trans(scale), mask=inside)


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
    least_m, least_k = group if columns else 1, group if rows else 1

    def grid(meta: Config) -> tuple[int, int]:
        return triton.cdiv(M, max(meta["TILE_M"], least_m)), triton.cdiv(K, max(meta["TILE_K"], least_k))

    _cast_lines[grid](
        x, data, scale, data_t, scale_t, M, K,
        ROWS=rows, COLUMNS=columns, GROUP=group, **cast_constants(dtype, scales),
    )  # fmt: skip
    return data.view(dtype), scale, data_t.view(dtype), scale_t
