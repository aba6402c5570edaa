"""float8 rows with power-of-two scales to float8 columns, transposed, without the tensor they came from.

    data[M, K], scale[M]   ->   data_t[K, M], scale_t[K]

One byte is read an element where casting the original again reads two or four. It rounds twice, which is why
nobody gets it without asking: but between powers of two only values that become subnormal in one of the two
casts lose anything, since elsewhere the mantissa is only moved. Given the maxima of the original's columns
(`cast_rows` yields them) its scales are exactly those of casting the original; without, those of the float8
values, at one more read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.numerics import (
    MANTISSA_BITS,
    Config,
    from_float8,
    magnitude,
    scales_of,
    to_float8,
    tuned,
    wrap_triton,
)

STRIP = 64
"""Rows over which `_maxima` takes the maximum of a column."""

CONFIGS_MAXIMA: tuple[Config, ...] = (
    {"BLOCK_K": 128, "num_warps": 4, "num_stages": 1},
    {"BLOCK_K": 256, "num_warps": 8, "num_stages": 1},
)
CONFIGS_TRANSPOSE: tuple[Config, ...] = (
    {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 16, "num_stages": 1},
)


@triton.jit
def _values(data_ptr, scale_ptr, m, k, M, K, MANTISSA: tl.constexpr):
    mask = (m < M)[:, None] & (k < K)[None, :]
    code = tl.load(data_ptr + m[:, None] * K + k[None, :], mask=mask, other=0)
    return from_float8(code, MANTISSA) * tl.load(scale_ptr + m, mask=m < M, other=1.0)[:, None]


@tuned(CONFIGS_MAXIMA, key=["M", "K"])
@triton.jit
def _maxima(
    data_ptr, scale_ptr, maxima_ptr, M, K, MANTISSA: tl.constexpr, STRIP: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * STRIP + tl.arange(0, STRIP)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    x = _values(data_ptr, scale_ptr, m, k, M, K, MANTISSA)
    tl.store(maxima_ptr + pid_m.to(tl.int64) * K + k, tl.max(magnitude(x), axis=0), mask=k < K)


@tuned(CONFIGS_TRANSPOSE, key=["M", "K"])
@triton.jit
def _transpose(
    data_ptr, scale_ptr, amax_ptr, data_t_ptr, scale_t_ptr, M, K,
    MANTISSA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    s, scale_t = scales_of(tl.load(amax_ptr + k, mask=k < K, other=0), MANTISSA, 1)
    if pid_m == 0:
        tl.store(scale_t_ptr + k, scale_t, mask=k < K)
    x = _values(data_ptr, scale_ptr, m, k, M, K, MANTISSA)
    mask = (m < M)[:, None] & (k < K)[None, :]
    code = to_float8(x * s[None, :], MANTISSA)
    tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


def value_maxima(data: Tensor, scale: Tensor) -> Tensor:
    """Maxima of the columns of `data[M, K] * scale[M, 1]`, `[M / STRIP, K]`, as the int32 bits of float32."""
    M, K = data.shape
    maxima = torch.empty((triton.cdiv(M, STRIP), K), dtype=torch.int32, device=data.device)

    def grid(meta: Config) -> tuple[int, int]:
        return triton.cdiv(M, STRIP), triton.cdiv(K, meta["BLOCK_K"])

    codes = data.view(torch.uint8)
    wrap_triton(_maxima)[grid](codes, scale, maxima, M, K, MANTISSA=MANTISSA_BITS[data.dtype], STRIP=STRIP)
    return maxima


def transpose_rows(data: Tensor, scale: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """`data_t[K, M]` and `scale_t[K, 1]` of contiguous `data[M, K]` with power-of-two `scale[M, 1]`.

    `maxima[any, K]` are of the columns, as the int32 bits of float32: the original's, or `value_maxima`'s.
    """
    M, K = data.shape
    amax = maxima.amax(dim=0)
    data_t = torch.empty((K, M), dtype=torch.uint8, device=data.device)
    scale_t = torch.empty((K, 1), dtype=torch.float32, device=data.device)

    def grid(meta: Config) -> tuple[int, int]:
        return triton.cdiv(M, meta["BLOCK_M"]), triton.cdiv(K, meta["BLOCK_K"])

    codes = data.view(torch.uint8)
    wrap_triton(_transpose)[grid](
        codes, scale, amax, data_t, scale_t, M, K, MANTISSA=MANTISSA_BITS[data.dtype]
    )
    return data_t.view(data.dtype), scale_t


def reference(data: Tensor, scale: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch. `amax[K]` are the maxima of the original's columns, if its scales are
    wanted.
    """
    x = data.float() * scale
    amax = x.abs().amax(dim=0) if amax is None else amax.float()
    largest = torch.finfo(data.dtype).max
    s = (largest / amax.double().clamp(min=1e-12)).float()
    s = torch.where(s.isnan(), s, (s.view(torch.int32) & 0x7F800000).view(torch.float32))
    code = (x * s).clamp(-largest, largest).to(data.dtype)
    return code.t().contiguous(), (1.0 / s.double()).float().unsqueeze(1)
