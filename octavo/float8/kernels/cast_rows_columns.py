"""Casts rows with one scale each, as `data[M, K]`, and columns with one scale each, as `data_t[K, M]`.

    first pass     reads x: maxima of rows, data, scale, and maxima of columns over each program's rows
    second pass    reads x again: data_t and scale_t

A program holds whole rows, so it casts a row in the pass that finds the row's maximum. A column's maximum is
known only after all rows were read, hence the second read. PyTorch and its compiler take four reads: two for
maxima, two for casts. Rows longer than `WIDEST` do not fit on a chip; programs then read theirs a second
time, soon enough to find it in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.kernel_launch import (
    Config,
    Destination,
    block_grid,
    cast_constants,
    empty_codes,
    empty_scale,
    rows_at_a_time,
    tuned,
)
from octavo.float8.kernels.numerics import magnitude, scales_of, to_float8, to_float32

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


@tuned(CONFIGS_ROWS, key=["M", "K", "COLUMNS"], alike=rows_at_a_time)
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
    for start in tl.range(0, STRIP, ROWS, num_stages=2):
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
    for start in tl.range(0, K, CHUNK, num_stages=2):
        k = start + tl.arange(0, CHUNK)
        mask = (m < M)[:, None] & (k < K)[None, :]
        along = tl.maximum(along, magnitude(to_float32(tl.load(x_rows + k[None, :], mask=mask, other=0.0))))
    s, scale = scales_of(tl.max(along, axis=1), MANTISSA, SCALES)
    tl.store(scale_ptr + m, scale, mask=m < M)
    for start in tl.range(0, K, CHUNK, num_stages=2):
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
    """Rows per program of the first pass: many, so that partial maxima of columns are few."""
    if K > WIDEST:
        return 8
    return 32 if M >= 4096 else 8


def cast_rows(
    x: Tensor, dtype: torch.dtype, scales: str, maxima: bool, out: Destination | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`data`, `scale[M, 1]` and, if `maxima`, partial maxima of columns for `cast_columns`."""
    M, K = x.shape
    strip = strip_of(M, K)
    data, scale = out or (empty_codes(x, columns=False)[0], empty_scale(x, (M, 1), scales))
    down = x.new_empty((triton.cdiv(M, strip), K) if maxima else (0, 0), dtype=torch.int32)
    constants = {"COLUMNS": maxima, "STRIP": strip, **cast_constants(dtype, scales)}
    kernel = _cast_wide_rows
    if K <= WIDEST:
        kernel, constants["BLOCK_K"] = _cast_rows, triton.next_power_of_2(K)
    kernel[(triton.cdiv(M, strip),)](x, data, scale, down, M, K, **constants)
    return data.view(dtype), scale, down


def column_maxima(x: Tensor) -> Tensor:
    """Partial maxima `[M / 64, K]` of the columns of x."""
    M, K = x.shape
    strip = 64
    maxima = x.new_empty((triton.cdiv(M, strip), K), dtype=torch.int32)

    def grid(meta: Config) -> tuple[int, int]:
        return triton.cdiv(M, strip), triton.cdiv(K, meta["BLOCK_K"])

    _column_maxima[grid](x, maxima, M, K, STRIP=strip)
    return maxima


def cast_columns(x: Tensor, maxima: Tensor, dtype: torch.dtype, scales: str) -> tuple[Tensor, Tensor]:
    """`data_t` and `scale_t[K, 1]`, given partial maxima `[any, K]` of x's columns."""
    M, K = x.shape
    _, data_t = empty_codes(x, rows=False)
    scale_t = empty_scale(x, (K, 1), scales)
    _cast_columns[block_grid(M, K)](
        x, maxima.amax(dim=0), data_t, scale_t, M, K, **cast_constants(dtype, scales)
    )
    return data_t.view(dtype), scale_t
