"""One matrix product per expert, over consecutive groups of rows.

    y[r] = x[r] . w[e]^T    for the rows r of expert e, from ends[e - 1] up to ends[e]

A GPU runs all groups as one kernel, `torch._grouped_mm`, in bfloat16. `loop` is the reference: plain
products, one after the other, in any dtype on any device. A group may be empty. The operator is opaque to
torch.compile, because the sizes of groups are data.

Shapes: R rows, sorted by expert; E experts, N output and K input features. `ends_E` is int32, ascending, and
its last entry is R.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def grouped_mm(x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """`[R, N]` in x's dtype, differentiable in x and w."""
    product: Tensor = torch.ops.octavo.grouped_mm(x_RK, w_ENK, ends_E)
    return product


def loop(x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """The reference of `grouped_mm`."""
    y_RN = x_RK.new_empty(x_RK.shape[0], w_ENK.shape[1])
    for expert, (start, end) in enumerate(pairwise([0, *ends_E.tolist()])):
        torch.mm(x_RK[start:end], w_ENK[expert].t(), out=y_RN[start:end])
    return y_RN


def loop_weight(dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor) -> Tensor:
    """The reference of the weight's gradient: dy^T . x of each group, `[E, N, K]`."""
    dw_ENK = x_RK.new_empty(ends_E.shape[0], dy_RN.shape[1], x_RK.shape[1])
    for expert, (start, end) in enumerate(pairwise([0, *ends_E.tolist()])):
        torch.mm(dy_RN[start:end].t(), x_RK[start:end], out=dw_ENK[expert])
    return dw_ENK


def _has_kernel(x: Tensor, *features: int) -> bool:
    """Whether `torch._grouped_mm` takes these operands: rows of whole 16 bytes, in bfloat16, on a GPU."""
    return x.is_cuda and x.dtype is torch.bfloat16 and all(size % 8 == 0 for size in features)


@torch.library.custom_op("octavo::grouped_mm", mutates_args=())
def _grouped_mm(x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor) -> Tensor:
    if _has_kernel(x_RK, *w_ENK.shape[1:]):
        return torch._grouped_mm(x_RK.contiguous(), w_ENK.contiguous().transpose(1, 2), offs=ends_E)
    return loop(x_RK, w_ENK, ends_E)


@torch.library.custom_op("octavo::grouped_mm_weight", mutates_args=())
def _grouped_mm_weight(dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor) -> Tensor:
    if _has_kernel(x_RK, dy_RN.shape[1], x_RK.shape[1]):
        return torch._grouped_mm(dy_RN.contiguous().t(), x_RK.contiguous(), offs=ends_E)
    return loop_weight(dy_RN, x_RK, ends_E)


@_grouped_mm.register_fake
def _(x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], w_ENK.shape[1])


@_grouped_mm_weight.register_fake
def _(dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor) -> Tensor:
    return x_RK.new_empty(ends_E.shape[0], dy_RN.shape[1], x_RK.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RK, w_ENK, ends_E = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    dx = grouped_mm(dy_RN, w_ENK.transpose(1, 2), ends_E) if need_x else None
    dw = torch.ops.octavo.grouped_mm_weight(dy_RN, x_RK, ends_E) if need_w else None
    return dx, dw, None


_grouped_mm.register_autograd(_backward, setup_context=_save)
