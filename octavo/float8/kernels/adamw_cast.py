"""An AdamW step that also produces the next step's float8 weights, or the maxima for casting them.

    w, grad, m, v  [N, K]   updated in place, and of the new w:
    adamw_squares           data[N, K], data_t[K, N], scale    one scale for each square, in this one pass
    adamw_maxima            maxima of rows and columns, for one more pass by `cast_given_maxima.py` or,
                            with the rows' maxima, `cast_tensor.py`

A step reads and writes every weight, and a separate cast would read it again, twice or more to find scales.
Here a cast costs only the bytes that it writes. The update is torch.optim.AdamW's (arXiv:1711.05101), with
decoupled decay and bias corrections in two factors of `Step`. Arithmetic is in float32; w (float32, bfloat16)
and the moments are each rounded once to their dtype. The cast is of w as stored, or of w rounded to `source`,
the dtype in which a mixed-precision forward pass reads it.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

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
from octavo.float8.kernels.kernel_maxima import WithMaxima
from octavo.float8.kernels.numerics import magnitude, rounded, scales_of, to_float8, to_float32

# Fixed, not tuned: the tile size determines the shape of the maxima. A program holds four float32 tiles.
TILE_M, TILE_K = 32, 128
CONFIGS: tuple[Config, ...] = (
    {"num_warps": 8, "num_stages": 1},
    {"num_warps": 4, "num_stages": 1},
)
UPDATES = ("w_ptr", "m_ptr", "v_ptr")
SOURCES = {None: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtype that the weight is rounded to before the cast; None: as stored."""


@dataclass(frozen=True)
class Step:
    """The scalars of one step: `rate` is lr / (1 - beta1^t), `root` the square root of 1 - beta2^t."""

    decay: float
    beta1: float
    beta2: float
    rate: float
    root: float
    eps: float

    @staticmethod
    def of(t: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Step:
        """The scalars of step `t`, counted from 1."""
        rate, root = lr / (1 - betas[0] ** t), math.sqrt(1 - betas[1] ** t)
        return Step(1 - lr * weight_decay, betas[0], betas[1], rate, root, eps)


@triton.jit
def _update(
    w_ptr, g_ptr, m_ptr, v_ptr, i, mask, decay, beta1, beta2, rate, root, eps, SOURCE: tl.constexpr
):  # fmt: skip
    """Step the elements i; what is to be cast of them, float32."""
    w = to_float32(tl.load(w_ptr + i, mask=mask, other=0.0))
    g = to_float32(tl.load(g_ptr + i, mask=mask, other=0.0))
    m = to_float32(tl.load(m_ptr + i, mask=mask, other=0.0))
    v = to_float32(tl.load(v_ptr + i, mask=mask, other=0.0))
    m += (g - m) * (1.0 - beta1)
    v = v * beta2 + (g * g) * (1.0 - beta2)
    tl.store(m_ptr + i, rounded(m, m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + i, rounded(v, v_ptr.dtype.element_ty), mask=mask)
    w = w * decay - rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    w = rounded(w, w_ptr.dtype.element_ty)
    tl.store(w_ptr + i, w, mask=mask)
    return _source(to_float32(w), SOURCE)


@triton.jit
def _source(w, SOURCE: tl.constexpr):
    if SOURCE == 1:
        w = to_float32(rounded(w, tl.bfloat16))
    if SOURCE == 2:
        w = to_float32(rounded(w, tl.float16))
    return w


@tuned(CONFIGS, key=["M", "K"], updates=UPDATES)
@triton.jit
def _adamw_maxima(
    w_ptr, g_ptr, m_ptr, v_ptr, rows_ptr, columns_ptr, M, K, decay, beta1, beta2, rate, root, eps,
    SOURCE: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    k = pid_k.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    i = m[:, None] * K + k[None, :]
    w = _update(w_ptr, g_ptr, m_ptr, v_ptr, i, mask, decay, beta1, beta2, rate, root, eps, SOURCE)
    bits = tl.where(mask, magnitude(w), 0)
    tl.store(rows_ptr + pid_k.to(tl.int64) * M + m, tl.max(bits, axis=1), mask=m < M)
    tl.store(columns_ptr + pid_m.to(tl.int64) * K + k, tl.max(bits, axis=0), mask=k < K)


@tuned(CONFIGS, key=["M", "K"], updates=UPDATES)
@triton.jit
def _adamw_squares(
    w_ptr, g_ptr, m_ptr, v_ptr, data_ptr, data_t_ptr, scale_ptr, M, K,
    decay, beta1, beta2, rate, root, eps,
    MANTISSA: tl.constexpr, SCALES: tl.constexpr, SOURCE: tl.constexpr, SIDE: tl.constexpr,
    TILE_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    k = pid_k.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    along = tl.zeros((SIDE,), tl.int32)
    for start in range(0, SIDE, TILE_M):
        m = pid_m.to(tl.int64) * SIDE + start + tl.arange(0, TILE_M)
        mask = (m < M)[:, None] & (k < K)[None, :]
        i = m[:, None] * K + k[None, :]
        w = _update(w_ptr, g_ptr, m_ptr, v_ptr, i, mask, decay, beta1, beta2, rate, root, eps, SOURCE)
        along = tl.maximum(along, tl.max(tl.where(mask, magnitude(w), 0), axis=0))
    s, scale = scales_of(tl.max(along, axis=0), MANTISSA, SCALES)
    tl.store(scale_ptr + pid_m * tl.cdiv(K, SIDE) + pid_k, scale)
    # A square of new weights is too much to hold beside the rest; each thread finds what it wrote in the
    # cache.
    for start in range(0, SIDE, TILE_M):
        m = pid_m.to(tl.int64) * SIDE + start + tl.arange(0, TILE_M)
        mask = (m < M)[:, None] & (k < K)[None, :]
        i = m[:, None] * K + k[None, :]
        w = _source(to_float32(tl.load(w_ptr + i, mask=mask, other=0.0)), SOURCE)
        code = to_float8(w * s, MANTISSA)
        tl.store(data_ptr + i, code, mask=mask)
        tl.store(data_t_ptr + k[:, None] * M + m[None, :], tl.trans(code), mask=tl.trans(mask))


Source = torch.dtype | None


def adamw_maxima(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Step, source: Source = None
) -> WithMaxima:
    """Step contiguous `w[N, K]` and its moments in place. Returns w and the maxima of its rows and columns.

    `source`: the dtype that w is rounded to before it is cast; None: its own.
    """
    M, K = w.shape
    tiles = triton.cdiv(M, TILE_M), triton.cdiv(K, TILE_K)
    rows = w.new_empty((tiles[1], M), dtype=torch.int32)
    columns = w.new_empty((tiles[0], K), dtype=torch.int32)
    _adamw_maxima[tiles](
        w, grad, m, v, rows, columns, M, K, *astuple(step),
        SOURCE=SOURCES[source], TILE_M=TILE_M, TILE_K=TILE_K,
    )  # fmt: skip
    return w, rows, columns


def adamw_squares(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Step, side: int, dtype: torch.dtype, scales: str,
    source: Source = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Step contiguous `w[N, K]` and its moments in place; returns `cast_tiles` of the new w."""
    M, K = w.shape
    grid = triton.cdiv(M, side), triton.cdiv(K, side)
    data, data_t = empty_codes(w)
    scale = empty_scale(w, grid, scales)
    _adamw_squares[grid](
        w, grad, m, v, data, data_t, scale, M, K, *astuple(step),
        SOURCE=SOURCES[source], SIDE=side, TILE_M=TILE_M, **cast_constants(dtype, scales),
    )  # fmt: skip
    return data.view(dtype), data_t.view(dtype), scale


def reference(w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """The new w, m and v in plain PyTorch; on float32, the operations of torch.optim.AdamW."""
    g = grad.float()
    m_ = m.float().lerp(g, 1 - step.beta1)
    v_ = v.float().mul(step.beta2).addcmul(g, g, value=1 - step.beta2)
    w_ = w.float().mul(step.decay).addcdiv(m_, (v_.sqrt() / step.root).add(step.eps), value=-step.rate)
    return w_.to(w.dtype), m_.to(m.dtype), v_.to(v.dtype)
