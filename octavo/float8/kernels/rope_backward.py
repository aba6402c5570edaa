"""The gradient of a rotary embedding (arXiv:2104.09864), with the maxima for casting it.

    dy[B, S, H, E], cos, sin[S, E / 2]   ->   dx[B S, H E],   maxima of its rows and of its columns

Attention's gradients of queries and keys are rotated back, each pair (2i, 2i + 1) of a head by its position's
angle, before wq's and wk's gradients are cast from them: rows for grad_input, columns for grad_weight. They
are stored head by head, so they must be copied into rows in any case. This copy also rotates, rounds once to
dy's dtype and computes the maxima, which saves the cast a read. In bfloat16 the copy reads and writes 2 bytes
per element, as does the cast; separate passes would take 4 of each and another read for the maxima.
"""

from __future__ import annotations

import torch
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
    {"num_warps": 8, "num_stages": 1},
    {"num_warps": 4, "num_stages": 1},
)


@tuned(CONFIGS, key=["M", "K"])
@triton.jit
def _rope_backward(
    dy_ptr, cos_ptr, sin_ptr, dx_ptr, rows_ptr, columns_ptr, M, K, S, stride_b, stride_s, stride_h,
    E: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    m = pid_m.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    k = pid_k.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    b, s = m // S, m % S
    i = (b * stride_b + s * stride_s)[:, None] + ((k // E) * stride_h + k % E)[None, :]
    dy = to_float32(tl.load(dy_ptr + i, mask=mask, other=0.0))
    even, odd = tl.split(tl.reshape(dy, (TILE_M, TILE_K // 2, 2)))
    pair = pid_k.to(tl.int64) * (TILE_K // 2) + tl.arange(0, TILE_K // 2)
    angle = s[:, None] * (E // 2) + (pair % (E // 2))[None, :]
    inside = (m < M)[:, None] & (pair < K // 2)[None, :]
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    dx = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (TILE_M, TILE_K))
    store_with_maxima(dx, dx_ptr, rows_ptr, columns_ptr, m, k, M, K, mask, pid_m, pid_k)


def rope_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> WithMaxima:
    """`dx[B S, H E]` with its maxima, given the gradient `dy[B, S, H, E]` of the rotated heads.

    `dy` may have any strides; `cos` and `sin` are float32 `[S or more, E / 2]`, one row per position. Raises
    ValueError for an odd E, or too few positions.
    """
    B, S, H, E = dy.shape
    if E % 2 or cos.shape[0] < S or cos.shape != sin.shape or cos.shape[1] != E // 2:
        raise ValueError(
            f"heads of {E} over {S} positions need an even width, and cos and sin of [{S} or more, "
            f"{E // 2}]; they are {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    dy = dy if dy.stride(3) == 1 else dy.contiguous()
    M, K = B * S, H * E
    made = empty_with_maxima(dy, M, K)
    _rope_backward[grid_of(M, K)](
        dy, cos.contiguous(), sin.contiguous(), *made, M, K, S, dy.stride(0), dy.stride(1), dy.stride(2),
        E=E, TILE_M=TILE_M, TILE_K=TILE_K,
    )  # fmt: skip
    return made


def reference(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`dx` in plain PyTorch, computed in float32 and rounded once, in dy's dtype."""
    S = dy.shape[1]
    cos, sin = cos[:S, None, :], sin[:S, None, :]
    even, odd = dy.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1)
    return turned.flatten(-2).to(dy.dtype).reshape(-1, dy.shape[2] * dy.shape[3])
