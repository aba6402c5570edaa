"""Casts with one scale per row and one per column in one read of x, given the maxima of both.

    x, maxima of its rows and of its columns   ->   data[M, K], scale[M, 1], data_t[K, M], scale_t[K, 1]

The kernel that produces x (`silu_mul.py`, `add_rms_norm.py`) computes the maxima as it writes. Rows may have
any width, since no program needs to hold a whole one.
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
from octavo.float8.kernels.numerics import scales_of, to_float8, to_float32

CONFIGS: tuple[Config, ...] = (
    {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 16, "num_stages": 1},
)


@tuned(CONFIGS, key=["M", "K"])
@triton.jit
def _cast_given_maxima(
    x_ptr, amax_ptr, amax_t_ptr, data_ptr, scale_ptr, data_t_ptr, scale_t_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    s, scale = scales_of(tl.load(amax_ptr + m, mask=m < M, other=0), MANTISSA, SCALES)
    if pid_k == 0:
        tl.store(scale_ptr + m, scale, mask=m < M)
    tl.store(data_ptr + m[:, None] * K + k[None, :], to_float8(x * s[:, None], MANTISSA), mask=mask)
    s_t, scale_t = scales_of(tl.load(amax_t_ptr + k, mask=k < K, other=0), MANTISSA, SCALES)
    if pid_m == 0:
        tl.store(scale_t_ptr + k, scale_t, mask=k < K)
    code = to_float8(x * s_t[None, :], MANTISSA)
    tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


def cast_given_maxima(
    x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, scales: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`data`, `scale[M, 1]`, `data_t`, `scale_t[K, 1]`; maxima are `rows[any, M]`, `columns[any, K]`."""
    M, K = x.shape
    data, data_t = empty_codes(x)
    scale, scale_t = empty_scale(x, (M, 1), scales), empty_scale(x, (K, 1), scales)
    _cast_given_maxima[block_grid(M, K)](
        x, rows.amax(dim=0), columns.amax(dim=0), data, scale, data_t, scale_t, M, K,
        **cast_constants(dtype, scales),
    )  # fmt: skip
    return data.view(dtype), scale, data_t.view(dtype), scale_t
