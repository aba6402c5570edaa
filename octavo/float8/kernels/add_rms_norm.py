"""Residual addition and RMSNorm (arXiv:1910.07467) and their gradients, with the maxima for casting them.

    forward     x, residual, w      -> h = x + residual,  y = h / rms(h) * w,   maxima of y's rows and columns
    backward    dy, dh, h, rms, w   -> dx (= d residual),  dw,                 maxima of dx's rows and columns

dh is the gradient that reaches h on the residual stream. dx is cast by the layer before, hence its maxima.

A program reads a strip of whole rows, since a row's mean is needed before its first element can be written.
Arithmetic is in float32; h and y are rounded once, to the inputs' dtype, and y is computed from the rounded
h. All are [M, K], with K at most `WIDEST`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.kernel_launch import Config, rows_at_a_time, tuned
from octavo.float8.kernels.kernel_maxima import WithMaxima
from octavo.float8.kernels.numerics import magnitude, rounded, to_float32

WIDEST = 8192
STRIP = 16
"""Rows per program. Fixed, not tuned: it determines the shape of the maxima."""

CONFIGS_FORWARD: tuple[Config, ...] = (
    {"TILE": 4096, "num_warps": 8, "num_stages": 1},
    {"TILE": 8192, "num_warps": 16, "num_stages": 1},
    {"TILE": 8192, "num_warps": 8, "num_stages": 1},
)
CONFIGS_BACKWARD: tuple[Config, ...] = (
    {"TILE": 4096, "num_warps": 16, "num_stages": 1},
    {"TILE": 4096, "num_warps": 8, "num_stages": 1},
)


@tuned(CONFIGS_FORWARD, key=["M", "K"], alike=rows_at_a_time)
@triton.jit
def _forward(
    x_ptr, residual_ptr, w_ptr, h_ptr, y_ptr, rms_ptr, rows_ptr, columns_ptr, M, K, eps,
    STRIP: tl.constexpr, BLOCK_K: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = min(max(TILE // BLOCK_K, 1), STRIP)
    pid = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    w = to_float32(tl.load(w_ptr + k, mask=k < K, other=0.0))
    down = tl.zeros((BLOCK_K,), tl.int32)
    for start in tl.range(0, STRIP, ROWS, num_stages=2):
        m = pid.to(tl.int64) * STRIP + start + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & (k < K)[None, :]
        i = m[:, None] * K + k[None, :]
        h = to_float32(tl.load(x_ptr + i, mask=mask, other=0.0))
        if RESIDUAL:
            residual = to_float32(tl.load(residual_ptr + i, mask=mask, other=0.0))
            h = rounded(h + residual, h_ptr.dtype.element_ty)
            tl.store(h_ptr + i, h, mask=mask)
            h = to_float32(h)
        rms = tl.sqrt_rn(tl.sum(h * h, axis=1) / K + eps)
        tl.store(rms_ptr + m, rms, mask=m < M)
        y = rounded(h * tl.div_rn(1.0, rms)[:, None] * w[None, :], y_ptr.dtype.element_ty)
        tl.store(y_ptr + i, y, mask=mask)
        bits = tl.where(mask, magnitude(to_float32(y)), 0)
        tl.store(rows_ptr + m, tl.max(bits, axis=1), mask=m < M)
        down = tl.maximum(down, tl.max(bits, axis=0))
    tl.store(columns_ptr + pid.to(tl.int64) * K + k, down, mask=k < K)


@tuned(CONFIGS_BACKWARD, key=["M", "K"], alike=rows_at_a_time)
@triton.jit
def _backward(
    dy_ptr, dh_ptr, h_ptr, rms_ptr, w_ptr, dx_ptr, dw_ptr, rows_ptr, columns_ptr, M, K,
    STRIP: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = min(max(TILE // BLOCK_K, 1), STRIP)
    pid = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    w = to_float32(tl.load(w_ptr + k, mask=k < K, other=0.0))
    down = tl.zeros((BLOCK_K,), tl.int32)
    dw = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, STRIP, ROWS, num_stages=2):
        m = pid.to(tl.int64) * STRIP + start + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & (k < K)[None, :]
        i = m[:, None] * K + k[None, :]
        per_rms = tl.div_rn(1.0, tl.load(rms_ptr + m, mask=m < M, other=1.0))[:, None]
        normed = to_float32(tl.load(h_ptr + i, mask=mask, other=0.0)) * per_rms
        dy = to_float32(tl.load(dy_ptr + i, mask=mask, other=0.0))
        dw += tl.sum(dy * normed, axis=0)
        dy *= w[None, :]
        along = (tl.sum(dy * normed, axis=1) / K)[:, None]
        dh = to_float32(tl.load(dh_ptr + i, mask=mask, other=0.0))
        dx = rounded((dy - normed * along) * per_rms + dh, dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + i, dx, mask=mask)
        bits = tl.where(mask, magnitude(to_float32(dx)), 0)
        tl.store(rows_ptr + m, tl.max(bits, axis=1), mask=m < M)
        down = tl.maximum(down, tl.max(bits, axis=0))
    tl.store(columns_ptr + pid.to(tl.int64) * K + k, down, mask=k < K)
    tl.store(dw_ptr + pid.to(tl.int64) * K + k, dw, mask=k < K)


def _empty(like: Tensor) -> WithMaxima:
    M, K = like.shape
    rows = like.new_empty((1, M), dtype=torch.int32)
    return torch.empty_like(like), rows, like.new_empty((triton.cdiv(M, STRIP), K), dtype=torch.int32)


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, WithMaxima]:
    """`h[M, K]`, `rms[M]` in float32, and `y` with its maxima; inputs are contiguous.

    Raises ValueError if K is more than `WIDEST`.
    """
    h = torch.empty_like(x)
    rms, y = _norm(x, residual, w, h, eps)
    return h, rms, y


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, WithMaxima]:
    """`add_rms_norm` without a residual: h is x."""
    return _norm(x, None, w, None, eps)


def _norm(
    x: Tensor, residual: Tensor | None, w: Tensor, h: Tensor | None, eps: float
) -> tuple[Tensor, WithMaxima]:
    M, K = x.shape
    if K > WIDEST:
        raise ValueError(f"rows of {K} do not fit on a chip: at most {WIDEST}; use plain PyTorch for them")
    rms, (y, rows, columns) = x.new_empty((M,), dtype=torch.float32), _empty(x)
    _forward[(triton.cdiv(M, STRIP),)](
        x, x if residual is None else residual, w, y if h is None else h, y, rms, rows, columns, M, K, eps,
        STRIP=STRIP, BLOCK_K=triton.next_power_of_2(K), RESIDUAL=residual is not None,
    )  # fmt: skip
    return rms, (y, rows, columns)


def add_rms_norm_backward(
    dy: Tensor, dh: Tensor, h: Tensor, rms: Tensor, w: Tensor
) -> tuple[WithMaxima, Tensor]:
    """`dx` (which is the residual's gradient too) with its maxima, and `dw[K]` in float32."""
    M, K = h.shape
    dx, rows, columns = _empty(h)
    strips = triton.cdiv(M, STRIP)
    dw = h.new_empty((strips, K), dtype=torch.float32)
    _backward[(strips,)](
        dy, dh, h, rms, w, dx, dw, rows, columns, M, K, STRIP=STRIP, BLOCK_K=triton.next_power_of_2(K)
    )
    return (dx, rows, columns), dw.sum(dim=0)


def reference(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`h`, `rms` and `y` in plain PyTorch, rounded where the kernel rounds."""
    h = (x.float() + residual.float()).to(x.dtype)
    rms = (h.float().square().mean(dim=1) + eps).sqrt()
    return h, rms, (h.float() * (1.0 / rms)[:, None] * w.float()).to(x.dtype)


def reference_backward(dy: Tensor, dh: Tensor, h: Tensor, rms: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """`dx` and `dw` in plain PyTorch."""
    normed = h.float() / rms[:, None]
    scaled = dy.float() * w.float()
    along = (scaled * normed).mean(dim=1, keepdim=True)
    dx = (scaled - normed * along) / rms[:, None] + dh.float()
    return dx.to(h.dtype), (dy.float() * normed).sum(dim=0)
