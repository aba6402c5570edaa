"""`x[M, K]` with one scale a row, as `data[M, K]`, and one scale a column, transposed, as `data_t[K, M]`.

    first pass     reads x once: maxima of rows, data, scale, and maxima of columns over each program's rows
    second pass    reads x again: data_t and scale_t, transposed on the way

A program holds whole rows, so a row's maximum is known before the row leaves the chip and the float8 row is
written at once. A column's maximum is known only when every row has been read, hence the second read. PyTorch
and its compiler take four: two for maxima, two for casts.

Rows longer than `WIDEST` do not fit on a chip; programs then read theirs a second time, soon enough to find
it in the cache. The reference is `quantize_both` with two blocks of (1, FULL).
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

WIDEST = 16384
"""Elements of a row that one program can hold."""

# TILE: elements held at a time, raised to one row.
CONFIGS_ROWS: tuple[Config, ...] = (
    {"TILE": 4096, "num_warps": 8, "num_stages": 1},
    {"TILE": 8192, "num_warps": 8, "num_stages": 1},
    {"TILE": 8192, "num_warps": 16, "num_stages": 1},
    {"TILE": 16384, "num_warps": 16, "num_stages": 1},
)
CONFIGS_WIDE_ROWS: tuple[Config, ...] = (
    {"CHUNK": 512, "num_warps": 8, "num_stages": 1},
    {"CHUNK": 1024, "num_warps": 8, "num_stages": 1},
)
CONFIGS_MAXIMA: tuple[Config, ...] = (
    {"BLOCK_K": 128, "num_warps": 4, "num_stages": 1},
    {"BLOCK_K": 256, "num_warps": 8, "num_stages": 1},
)
CONFIGS_COLUMNS: tuple[Config, ...] = (
    {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 16, "num_stages": 1},
)


@tuned(CONFIGS_ROWS, key=["M", "K", "COLUMNS"])
@triton.jit
def _cast_rows(
    x_ptr, data_ptr, scale_ptr, maxima_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = min(max(TILE // BLOCK_K, 1), STRIP)
    pid = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    down = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, STRIP, ROWS):
        m = pid.to(tl.int64) * STRIP + start + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
        bits = magnitude(x)
        s, scale = scales_of(tl.max(bits, axis=1), MANTISSA, SCALES)
        tl.store(scale_ptr + m, scale, mask=m < M)
        tl.store(data_ptr + m[:, None] * K + k[None, :], to_float8(x * s[:, None], MANTISSA), mask=mask)
        if COLUMNS:
            down = tl.maximum(down, tl.max(bits, axis=0))
    if COLUMNS:
        tl.store(maxima_ptr + pid.to(tl.int64) * K + k, down, mask=k < K)


@tuned(CONFIGS_WIDE_ROWS, key=["M", "K", "COLUMNS"])
@triton.jit
def _cast_wide_rows(
    x_ptr, data_ptr, scale_ptr, maxima_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    m = pid.to(tl.int64) * STRIP + tl.arange(0, STRIP)
    x_rows = x_ptr + m[:, None] * K
    along = tl.zeros((STRIP, CHUNK), tl.int32)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        mask = (m < M)[:, None] & (k < K)[None, :]
        along = tl.maximum(along, magnitude(to_float32(tl.load(x_rows + k[None, :], mask=mask, other=0.0))))
    s, scale = scales_of(tl.max(along, axis=1), MANTISSA, SCALES)
    tl.store(scale_ptr + m, scale, mask=m < M)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x = to_float32(tl.load(x_rows + k[None, :], mask=mask, other=0.0))
        tl.store(data_ptr + m[:, None] * K + k[None, :], to_float8(x * s[:, None], MANTISSA), mask=mask)
        if COLUMNS:
            tl.store(maxima_ptr + pid.to(tl.int64) * K + k, tl.max(magnitude(x), axis=0), mask=k < K)


@tuned(CONFIGS_MAXIMA, key=["M", "K"])
@triton.jit
def _column_maxima(x_ptr, maxima_ptr, M, K, STRIP: tl.constexpr, BLOCK_K: tl.constexpr):
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * STRIP + tl.arange(0, STRIP)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    tl.store(maxima_ptr + pid_m.to(tl.int64) * K + k, tl.max(magnitude(x), axis=0), mask=k < K)


@tuned(CONFIGS_COLUMNS, key=["M", "K"])
@triton.jit
def _cast_columns(
    x_ptr, amax_ptr, data_t_ptr, scale_t_ptr, M, K,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    s, scale = scales_of(tl.load(amax_ptr + k, mask=k < K, other=0), MANTISSA, SCALES)
    if pid_m == 0:
        tl.store(scale_t_ptr + k, scale, mask=k < K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = to_float32(tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    code = to_float8(x * s[None, :], MANTISSA)
    tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


def strip_of(M: int, K: int) -> int:
    """Rows that one program of the first pass goes through: enough that maxima of columns are few."""
    if K > WIDEST:
        return 8
    return 32 if M >= 4096 else 8


def cast_rows(x: Tensor, dtype: torch.dtype, scales: str, maxima: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`data[M, K]` and `scale[M, 1]` of contiguous `x[M, K]`, and, if asked for, maxima of columns for
    `cast_columns`.

    `scales` is a key of `SCALE_FORMATS`.
    """
    M, K = x.shape
    strip = strip_of(M, K)
    data = x.new_empty((M, K), dtype=torch.uint8)
    scale = empty_scale(x, (M, 1), scales)
    down = x.new_empty((triton.cdiv(M, strip), K) if maxima else (0, 0), dtype=torch.int32)
    numbers = {"MANTISSA": MANTISSA_BITS[dtype], "SCALES": SCALE_FORMATS[scales], "STRIP": strip}
    grid = (triton.cdiv(M, strip),)
    if K > WIDEST:
        wrap_triton(_cast_wide_rows)[grid](x, data, scale, down, M, K, COLUMNS=maxima, **numbers)
    else:
        wrap_triton(_cast_rows)[grid](
            x, data, scale, down, M, K, COLUMNS=maxima, BLOCK_K=triton.next_power_of_2(K), **numbers
        )
    return data.view(dtype), scale, down


def column_maxima(x: Tensor) -> Tensor:
    """Maxima of the columns of contiguous `x[M, K]`, over strips of rows: `[M / strip, K]`, the int32 bits of
    float32.
    """
    M, K = x.shape
    strip = 64
    maxima = x.new_empty((triton.cdiv(M, strip), K), dtype=torch.int32)

    def grid(meta: Config) -> tuple[int, int]:
        return triton.cdiv(M, strip), triton.cdiv(K, meta["BLOCK_K"])

    wrap_triton(_column_maxima)[grid](x, maxima, M, K, STRIP=strip)
    return maxima


def cast_columns(x: Tensor, maxima: Tensor, dtype: torch.dtype, scales: str) -> tuple[Tensor, Tensor]:
    """`data_t[K, M]` and `scale_t[K, 1]` of contiguous `x[M, K]`, given maxima `[any, K]` of its columns."""
    M, K = x.shape
    amax = maxima.amax(dim=0)
    data_t = x.new_empty((K, M), dtype=torch.uint8)
    scale_t = empty_scale(x, (K, 1), scales)

    def grid(meta: Config) -> tuple[int, int]:
        return triton.cdiv(M, meta["BLOCK_M"]), triton.cdiv(K, meta["BLOCK_K"])

    wrap_triton(_cast_columns)[grid](
        x, amax, data_t, scale_t, M, K, MANTISSA=MANTISSA_BITS[dtype], SCALES=SCALE_FORMATS[scales]
    )
    return data_t.view(dtype), scale_t
