"""All-gather of an activation in float8, for tokens that are sharded over ranks (sequence parallelism).

Every rank has some of the tokens, and a product needs all of them. The product reads float8, so float8 is
sent: each rank casts its own tokens with the scales of the whole tensor, and one all-gather carries the bytes
of both casts and of scales that differ between tokens. Bytes, because not every backend supports float8.

    one scale per tensor    one cast serves both products    1 byte per element, after reducing a maximum
    one scale per row       x_MK and x_KM differ             2 bytes, or 1 if the weight needs no gradient

Backward sums over the ranks, and each keeps its own tokens: a reduce-scatter in high precision.

`GatheredInput` is the result of one gather for several linears (wq, wk and wv): the casts, and a stand-in
tensor for autograd. It is not a tensor, so any operation on it except a `Float8Linear` raises.

The tokens of `[batch, sequence, K]` sharded by sequence, when flattened, are not one run of rows but
`pieces`, one per batch entry: the rows of all ranks are `[pieces, ranks, rows per piece]`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from octavo.float8.casts.delayed_statistics import OperandStatistics, quantize_operand
from octavo.float8.distributed.tp_scales import ShardedAxis
from octavo.float8.quantize import Casts, Quantized, transposed
from octavo.float8.recipe import FULL, Cast


def count_pieces(shape: torch.Size, dim: int) -> int:
    """The number of runs of rows in a rank's tokens if `dim` of `shape[..., features]` is sharded."""
    return prod(shape[:dim])


def can_gather(rows: int, pieces: int, row: Cast | None, col: Cast | None) -> bool:
    """Whether casting `rows` rows per rank by `row` (and `col`, if given) gives the whole tensor's casts:
    False if blocks of tokens would straddle ranks.
    """
    if row is None or pieces == 0:
        return False
    sizes = (row.block[0], FULL if col is None else col.block[1])
    return all(size == FULL or rows // pieces % size == 0 for size in sizes)


# ------------------------------------------------------------------------------------------- moving the rows


def _merge(x: Tensor, pieces: int) -> Tensor:
    """`x[ranks, rows, C]` as `[all rows, C]` in the order of the whole tensor."""
    return x.unflatten(1, (pieces, -1)).transpose(0, 1).reshape(-1, x.shape[2])


def _merge_columns(x: Tensor, pieces: int) -> Tensor:
    """`x[ranks, C, rows]` as `[C, all rows]`, contiguous, as products read it."""
    return x.unflatten(2, (pieces, -1)).permute(1, 2, 0, 3).reshape(x.shape[1], -1)


def _gather_bytes(x: Tensor, size: int, group: str) -> Tensor:
    """uint8 `x[n]` of every rank as `[size, n]`."""
    out = torch.ops._c10d_functional.all_gather_into_tensor(x, size, group)
    return torch.ops._c10d_functional.wait_tensor(out).view(size, -1)


def gather_tokens(tensors: list[tuple[Tensor, int]], pieces: int, size: int, group: str) -> list[Tensor]:
    """Each tensor with the tokens of all ranks along the given dimension, in one all-gather of bytes."""
    sent = [t.contiguous().view(torch.uint8).flatten() for t, _ in tensors]
    got = _gather_bytes(torch.cat(sent) if len(sent) > 1 else sent[0], size, group)
    whole, start = [], 0
    for (t, dim), piece in zip(tensors, sent, strict=True):
        part = got.narrow(1, start, piece.numel()).contiguous().view(t.dtype).view(size, *t.shape)
        whole.append(_merge(part, pieces) if dim == 0 else _merge_columns(part, pieces))
        start += piece.numel()
    return whole


def scatter_rows(x: Tensor, pieces: int, size: int, group: str) -> Tensor:
    """This rank's rows of the sum over all ranks of `x[all rows, C]`."""
    parts = x.unflatten(0, (pieces, size, -1)).transpose(0, 1).contiguous()
    out = torch.ops._c10d_functional.reduce_scatter_tensor(parts.flatten(0, 2), "sum", size, group)
    return torch.ops._c10d_functional.wait_tensor(out)


def cast_and_gather(
    x: Tensor,
    row: Cast,
    col: Cast | None,
    *,
    pieces: int,
    size: int,
    group: str,
    statistics: OperandStatistics | None = None,
    record: bool = True,
    count_saturated: bool = True,
) -> Casts:
    """The casts of the whole `x[M, K]`, as `[M, K]` and `[K, M]`, given this rank's rows of it.

    `statistics`, `record` and `count_saturated` as in `quantize_operand`.
    """
    first, second = quantize_operand(
        x, row, col, ShardedAxis(0, group), statistics, record=record, count_saturated=count_saturated
    )
    assert isinstance(first, Quantized)
    shared = col == row and row.square
    sent: list[tuple[Tensor, int]] = []  # and the dimension of the tokens
    # Scales first, because a four-byte scale must start at a multiple of four bytes.
    if row.block[0] != FULL:
        sent.append((first.scale, 0))
    if col is not None and not shared and col.block[1] != FULL:
        assert isinstance(second, Quantized)
        sent.append((second.scale, 1))
    sent.append((first.data, 0))
    if col is not None and not shared:
        assert isinstance(second, Quantized)
        sent.append((second.data, 1))
    got = iter(gather_tokens(sent, pieces, size, group))

    row_scale = next(got) if row.block[0] != FULL else first.scale
    col_scale = None
    if col is not None and not shared:
        assert isinstance(second, Quantized)
        col_scale = next(got) if col.block[1] != FULL else second.scale
    x_MK = Quantized(next(got), row_scale)
    if col is None:
        return x_MK, None
    if shared:
        return x_MK, transposed(x_MK)
    assert col_scale is not None
    return x_MK, Quantized(next(got), col_scale)


# ------------------------------------------------------------------------------- ----- inputs of linears


class _GradientStandIn(torch.autograd.Function):
    """A stand-in for the whole `x[M, K]` in autograd, whose gradient is reduce-scattered over the ranks. It
    is one expanded element, which nothing reads.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: int, size: int, group: str) -> Tensor:
        ctx.where = pieces, size, group
        return x.new_zeros(1, 1).expand(x.shape[0] * size, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scatter_rows(grads[0], *ctx.where), None, None, None


_REMEDY = (
    "this input was gathered in float8, which only a Float8Linear can read. If a module prepared by "
    "PrepareFloat8ModuleInput uses its input otherwise, gather in high precision with torch's "
    "PrepareModuleInput"
)


class GatheredInput:
    """A linear's input `[..., K]` of which only the float8 casts exist, for `Float8Linear`s.

    It has the shape, dtype and device of a tensor; any other tensor operation raises TypeError.
    """

    def __init__(self, edge: Tensor, casts: Casts, shape: torch.Size) -> None:
        self.edge, self.casts, self.shape = edge, casts, shape
        self.dtype, self.device, self.requires_grad = edge.dtype, edge.device, edge.requires_grad

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, dtype: torch.dtype) -> GatheredInput:
        if dtype != self.dtype:
            raise TypeError(f"conversion from {self.dtype} to {dtype}: {_REMEDY}")
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of Python
            raise AttributeError(name)
        raise TypeError(f".{name}: {_REMEDY}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{getattr(func, '__name__', func)}: {_REMEDY}")

    def __repr__(self) -> str:
        return f"GatheredInput(shape={tuple(self.shape)}, dtype={self.dtype})"


def gathered_input(
    x: Tensor, casts: Casts, shape: torch.Size, *, pieces: int, size: int, group: str
) -> GatheredInput:
    """The gathered input `shape[..., K]`, given this rank's rows `x[M, K]` and the gathered casts."""
    return GatheredInput(_GradientStandIn.apply(x, pieces, size, group), casts, shape)
