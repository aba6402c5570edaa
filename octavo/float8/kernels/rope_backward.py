"""The gradient of a rotary embedding, laid out and measured for the cast that follows it.

    dy[B, S, H, E], cos, sin[S, E / 2]   ->   dx[B S, H E],   maxima of its rows and of its columns

Attention gives the gradients of its queries and keys, each pair (2i, 2i + 1) of a head rotated by its
position's angle (arXiv:2104.09864). Rotating them back is what wq's and wk's own gradients are cast from:
rows for grad_input, columns for grad_weight. Attention's gradients lie head by head in memory, so somebody
has to copy them into rows anyway; this copy rotates, rounds once to dy's dtype, and notes the maxima
(`maxima.py`), which saves the cast a read. In bfloat16 that is 2 bytes read and 2 written an element, then 2
and 2 for the cast; separate passes would be 4 of each and another read for the maxima.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels.kernel_maxima import (
    TILE_K,
    TILE_M,
    Made,
    empty_with_maxima,
    grid_of,
    store_with_maxima,
)
from octavo.float8.kernels.numerics import Config, to_float32, tuned, wrap_triton

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


def rope_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Made:
    """`dx[B S, H E]` of `dy[B, S, H, E]`, the gradient of what was rotated, with its maxima.

    dy may have any strides but for its last axis, which is contiguous; `cos` and `sin` are float32, one row
    of E / 2 a position, S of them or more. Raises ValueError for an odd E, or too few positions.
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
    wrap_triton(_rope_backward)[grid_of(M, K)](
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
