"""`h = silu(a) * b` and its gradients, with the maxima for casting them.

    forward     a, b       -> h,       maxima of its rows and of its columns
    backward    dh, a, b   -> da, db,  and the maxima of each

Arithmetic is in float32, rounded once to the inputs' dtype. All are `[M, K]`; a and b may be slices of a
wider tensor (one product computes both), whose rows are `stride` apart.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.kernel_launch import Config, tuned
from octavo.float8.kernels.kernel_maxima import (
    TILE_K,
    TILE_M,
    WithMaxima,
    empty_with_maxima,
    grid_of,
    store_with_maxima,
)
from octavo.float8.kernels.numerics import to_float32

CONFIGS: tuple[Config, ...] = (
    {"num_warps": 4, "num_stages": 1},
    {"num_warps": 8, "num_stages": 1},
)


@tuned(CONFIGS, key=["M", "K"])
@triton.jit
def _forward(
    a_ptr, b_ptr, h_ptr, rows_ptr, columns_ptr, M, K, stride, TILE_M: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    k = pid_k.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    i = m[:, None] * stride + k[None, :]
    a = to_float32(tl.load(a_ptr + i, mask=mask, other=0.0))
    b = to_float32(tl.load(b_ptr + i, mask=mask, other=0.0))
    h = tl.div_rn(a, 1.0 + tl.exp(-a)) * b
    store_with_maxima(h, h_ptr, rows_ptr, columns_ptr, m, k, M, K, mask, pid_m, pid_k)


@tuned(CONFIGS, key=["M", "K"])
@triton.jit
def _backward(
    dh_ptr, a_ptr, b_ptr, da_ptr, da_rows_ptr, da_columns_ptr, db_ptr, db_rows_ptr, db_columns_ptr, M, K,
    stride, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    k = pid_k.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    i = m[:, None] * stride + k[None, :]
    a = to_float32(tl.load(a_ptr + i, mask=mask, other=0.0))
    b = to_float32(tl.load(b_ptr + i, mask=mask, other=0.0))
    dh = to_float32(tl.load(dh_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0))
    sigmoid = tl.div_rn(1.0, 1.0 + tl.exp(-a))
    da = dh * b * (sigmoid * (1.0 + a * (1.0 - sigmoid)))
    db = dh * (a * sigmoid)
    store_with_maxima(da, da_ptr, da_rows_ptr, da_columns_ptr, m, k, M, K, mask, pid_m, pid_k)
    store_with_maxima(db, db_ptr, db_rows_ptr, db_columns_ptr, m, k, M, K, mask, pid_m, pid_k)


def _stride(a: Tensor, b: Tensor) -> int:
    assert a.stride() == b.stride(), (a.stride(), b.stride())
    assert a.stride(1) == 1
    return a.stride(0)


def silu_mul(a: Tensor, b: Tensor) -> WithMaxima:
    """`h` with its maxima. Rows of `a[M, K]` and `b[M, K]` are contiguous and have one stride."""
    M, K = a.shape
    h = empty_with_maxima(a, M, K)
    _forward[grid_of(M, K)](a, b, *h, M, K, _stride(a, b), TILE_M=TILE_M, TILE_K=TILE_K)
    return h


def silu_mul_backward(dh: Tensor, a: Tensor, b: Tensor) -> tuple[WithMaxima, WithMaxima]:
    """`da` and `db`, each with its maxima, given contiguous `dh[M, K]` and `a`, `b` as in `silu_mul`."""
    M, K = a.shape
    da, db = empty_with_maxima(a, M, K), empty_with_maxima(a, M, K)
    _backward[grid_of(M, K)](dh, a, b, *da, *db, M, K, _stride(a, b), TILE_M=TILE_M, TILE_K=TILE_K)
    return da, db


def reference(a: Tensor, b: Tensor) -> Tensor:
    """`h` in plain PyTorch, rounded once, in a's dtype."""
    return (F.silu(a.float()) * b.float()).to(a.dtype)


def reference_backward(dh: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`da` and `db` in plain PyTorch, rounded once, in a's dtype."""
    a_, b_, dh_ = a.float(), b.float(), dh.float()
    sigmoid = a_.sigmoid()
    da = dh_ * b_ * (sigmoid * (1 + a_ * (1 - sigmoid)))
    return da.to(a.dtype), (dh_ * (a_ * sigmoid)).to(a.dtype)
