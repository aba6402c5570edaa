"""Casts with one scale for the tensor that is known in advance (delayed scaling), in one read of x.

    x, amax   ->   data[M, K], data_t[K, M], scale[1, 1],   x's own maxima,   counts of saturated elements

A finite element beyond amax becomes the format's largest number, and is counted, so that the caller can judge
whether amax was a good choice. A non-finite element becomes NaN: a saturating conversion would turn an
infinity into 448 unnoticed. The maxima are for the next amax. The reference is `quantize_with_amax`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.kernel_launch import (
    Config,
    cast_constants,
    empty_codes,
    empty_scale,
    tuned,
)
from octavo.float8.kernels.numerics import magnitude, scales_of, to_float8, to_float32

# Fixed, not tuned: the tile size determines the shape of the maxima.
TILE_M, TILE_K = 64, 128
CONFIGS: tuple[Config, ...] = (
    {"num_warps": 8, "num_stages": 1},
    {"num_warps": 4, "num_stages": 1},
    {"num_warps": 16, "num_stages": 1},
)


@triton.jit
def float8_or_nan(x, bits, s, MANTISSA: tl.constexpr):
    """The codes of `x * s`, saturating; NaN where x, whose magnitudes' bits are given, is not finite."""
    return to_float8(tl.where(bits >= 0x7F800000, float("nan"), x * s), MANTISSA)


@triton.jit
def beyond(bits, amax, mask):
    """How many finite magnitudes are larger than amax, all as bits; int32."""
    return tl.sum(tl.sum(((bits > amax) & (bits < 0x7F800000) & mask).to(tl.int32), axis=1), axis=0)


@tuned(CONFIGS, key=["M", "K", "ROWS", "COLUMNS"])
@triton.jit
def _cast_given_scale(
    x_ptr, amax_ptr, data_ptr, data_t_ptr, scale_ptr, maxima_ptr, saturated_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    amax = tl.load(amax_ptr)
    s, scale = scales_of(amax, MANTISSA, SCALES)
    if pid_m + pid_k == 0:
        tl.store(scale_ptr, scale)
    m = pid_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    k = pid_k.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    bits = magnitude(x)
    program = pid_m.to(tl.int64) * tl.num_programs(1) + pid_k
    tl.store(maxima_ptr + program, tl.max(tl.max(bits, axis=1), axis=0))
    tl.store(saturated_ptr + program, beyond(bits, amax, mask))
    code = float8_or_nan(x, bits, s, MANTISSA)
    if ROWS:
        tl.store(data_ptr + m[:, None] * K + k[None, :], code, mask=mask)
    if COLUMNS:
        tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


def programs_of(M: int, K: int) -> int:
    """The number of partial maxima and of partial counts."""
    return triton.cdiv(M, TILE_M) * triton.cdiv(K, TILE_K)


def cast_given_scale(
    x: Tensor, amax: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`data`, `data_t`, `scale[1, 1]`, partial maxima, and partial counts of saturated elements (int32).

    `amax[1, 1]` is float32 and finite.
    """
    M, K = x.shape
    data, data_t = empty_codes(x, rows, columns)
    scale = empty_scale(x, (1, 1), scales)
    maxima, saturated = (x.new_empty((programs_of(M, K),), dtype=torch.int32) for _ in range(2))
    _cast_given_scale[(triton.cdiv(M, TILE_M), triton.cdiv(K, TILE_K))](
        x, amax.view(torch.int32), data, data_t, scale, maxima, saturated, M, K,
        ROWS=rows, COLUMNS=columns, TILE_M=TILE_M, TILE_K=TILE_K, **cast_constants(dtype, scales),
    )  # fmt: skip
    return data.view(dtype), data_t.view(dtype), scale, maxima, saturated
