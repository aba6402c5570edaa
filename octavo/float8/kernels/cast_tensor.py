"""Casts with one scale for the whole tensor: two reads of x, the first only for the maximum.

    magnitudes(x)             one maximum for each program
    cast_tensor(x, maxima)    data[M, K], data_t[K, M] and scale[1, 1] in one pass

The second pass reduces the maxima of the first itself, which saves a launch. The kernel that produces x can
supply the maxima in place of `magnitudes(x)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.kernel_launch import (
    Config,
    block_grid,
    cast_constants,
    empty_codes,
    empty_scale,
    tuned,
)
from octavo.float8.kernels.numerics import magnitude, scales_of, to_float8, to_float32

MAX_PROGRAMS = 1024
"""Of the first pass, so that each program of the second reads at most so many maxima."""

CONFIGS_MAGNITUDES: tuple[Config, ...] = (
    {"BLOCK": 4096, "num_warps": 8, "num_stages": 1},
    {"BLOCK": 4096, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 8192, "num_warps": 8, "num_stages": 1},
)
CONFIGS_CAST: tuple[Config, ...] = (
    {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 16, "num_stages": 1},
)


@tuned(CONFIGS_MAGNITUDES, key=["N"])
@triton.jit
def _magnitudes(x_ptr, maxima_ptr, N, programs, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(pid.to(tl.int64) * BLOCK, N, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = magnitude(to_float32(tl.load(x_ptr + i, mask=i < N, other=0.0)))
        largest = tl.maximum(largest, bits)
    tl.store(maxima_ptr + pid, tl.max(largest, axis=0))


@tuned(CONFIGS_CAST, key=["M", "K", "ROWS", "COLUMNS"])
@triton.jit
def _cast_tensor(
    x_ptr, maxima_ptr, data_ptr, data_t_ptr, scale_ptr, M, K, P,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, PROGRAMS)
    amax = tl.max(tl.load(maxima_ptr + p, mask=p < P, other=0), axis=0)
    s, scale = scales_of(amax, MANTISSA, SCALES)
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    if pid_m + pid_k == 0:
        tl.store(scale_ptr, scale)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    code = to_float8(x * s, MANTISSA)
    if ROWS:
        tl.store(data_ptr + m[:, None] * K + k[None, :], code, mask=mask)
    if COLUMNS:
        tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


def magnitudes(x: Tensor) -> Tensor:
    """Maxima of parts of contiguous x, at most `MAX_PROGRAMS` of them."""
    N = x.numel()
    programs = min(MAX_PROGRAMS, triton.cdiv(N, CONFIGS_MAGNITUDES[0]["BLOCK"]))
    maxima = x.new_empty((programs,), dtype=torch.int32)
    _magnitudes[(programs,)](x, maxima, N, programs)
    return maxima


def cast_tensor(
    x: Tensor, maxima: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`data`, `data_t` and `scale[1, 1]`. `maxima[P]`, P at most `MAX_PROGRAMS`, are those of parts of x."""
    M, K = x.shape
    data, data_t = empty_codes(x, rows, columns)
    scale = empty_scale(x, (1, 1), scales)
    _cast_tensor[block_grid(M, K)](
        x, maxima, data, data_t, scale, M, K, maxima.shape[0],
        ROWS=rows, COLUMNS=columns, PROGRAMS=MAX_PROGRAMS, **cast_constants(dtype, scales),
    )  # fmt: skip
    return data.view(dtype), data_t.view(dtype), scale
