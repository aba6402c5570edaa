"""Tokens that are spread over a group of ranks, gathered in float8.

Under sequence parallelism every rank holds some of the tokens, and a product needs all of them. What the
product reads is float8, so that is what travels: each rank casts its own tokens, with the scales that the
whole tensor would get, and one all-gather carries the bytes of both forms of the operand and of such scales
as differ from token to token. Bytes, because not every backend knows float8.

    one scale a tensor    one form serves both products    1 byte an element, and a maximum reduced before
    one scale a row       x_MK and x_KM differ             2 bytes, 1 where the weight needs no gradient

The way back is a sum over the ranks of which each keeps its own tokens: a reduce-scatter in high precision.

`Gathered` is what several linears with one input (wq, wk and wv) are handed after one gather: a tensor to the
eye, with nothing but float8 in it. Any operation but a `Float8Linear` on it raises. Its gradient is
an ordinary tensor.

Flattened, tokens of `[batch, sequence, K]` that are sharded by sequence are not one run of rows but `pieces`
of them, one a batch entry: the rows of all ranks are `[pieces, ranks, rows a piece]`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from octavo.float8.quantize import Quantized, quantize_both, transposed
from octavo.float8.recipe import FULL, Cast
from octavo.float8.shared import Casts
from octavo.float8.split import Split


def pieces_of(shape: torch.Size, dim: int) -> int:
    """How many runs of rows the tokens of one rank are, if `dim` of `shape[..., features]` is sharded."""
    return prod(shape[:dim])


def can_gather(rows: int, pieces: int, row: Cast | None, col: Cast | None) -> bool:
    """Whether `rows` rows a rank cast as `row` (and, if given, as `col`) give the whole tensor's casts: not
    where blocks of tokens would straddle ranks.
    """
    if row is None or pieces == 0:
        return False
    sizes = (row.block[0], FULL if col is None else col.block[1])
    return all(size == FULL or rows // pieces % size == 0 for size in sizes)


# ------------------------------------------------------------------------------------------- moving the rows


def _merge(x: Tensor, pieces: int) -> Tensor:
    """`x[ranks, rows, C]` as `[all rows, C]` in the order of the whole tensor."""
    return x.unflatten(1, (pieces, -1)).transpose(0, 1).reshape(-1, x.shape[2])


def _gather_bytes(x: Tensor, size: int, group: str) -> Tensor:
    """uint8 `x[n]` of every rank as `[size, n]`."""
    out = torch.ops._c10d_functional.all_gather_into_tensor(x, size, group)
    return torch.ops._c10d_functional.wait_tensor(out).view(size, -1)


def gather_rows(tensors: list[Tensor], pieces: int, size: int, group: str) -> list[Tensor]:
    """Each of `tensors[rows, C]` with the rows of all ranks, `[all rows, C]`, in one all-gather of bytes."""
    sent = [t.contiguous().view(torch.uint8).flatten() for t in tensors]
    got = _gather_bytes(torch.cat(sent) if len(sent) > 1 else sent[0], size, group)
    whole, start = [], 0
    for t, piece in zip(tensors, sent, strict=True):
        mine = got.narrow(1, start, piece.numel()).contiguous()
        rows = mine.view(t.dtype).view(size, t.shape[0], t.shape[1])
        whole.append(_merge(rows, pieces))
        start += piece.numel()
    return whole


def scatter_rows(x: Tensor, pieces: int, size: int, group: str) -> Tensor:
    """The sum over all ranks of `x[all rows, C]`, of which this rank keeps its own rows."""
    parts = x.unflatten(0, (pieces, size, -1)).transpose(0, 1).contiguous()
    out = torch.ops._c10d_functional.reduce_scatter_tensor(parts.flatten(0, 2), "sum", size, group)
    return torch.ops._c10d_functional.wait_tensor(out)


def cast_and_gather(x: Tensor, row: Cast, col: Cast | None, *, pieces: int, size: int, group: str) -> Casts:
    """The casts of the whole `x[M, K]`, as `[M, K]` and `[K, M]`, given this rank's rows of it."""
    first, second = quantize_both(x, row, col, Split(0, group))
    assert isinstance(first, Quantized)
    shared = col == row and row.square
    sent: list[Tensor] = []
    # Scales first: a scale of four bytes must start at a multiple of four.
    if row.block[0] != FULL:
        sent.append(first.scale)
    if col is not None and not shared and col.block[1] != FULL:
        assert isinstance(second, Quantized)
        sent.append(second.scale.t())
    sent.append(first.data)
    if col is not None and not shared:
        assert isinstance(second, Quantized)
        sent.append(second.data.t())
    got = iter(gather_rows(sent, pieces, size, group))

    row_scale = next(got) if row.block[0] != FULL else first.scale
    col_scale = None
    if col is not None and not shared:
        assert isinstance(second, Quantized)
        col_scale = next(got).t() if col.block[1] != FULL else second.scale
    x_MK = Quantized(next(got), row_scale)
    if col is None:
        return x_MK, None
    if shared:
        return x_MK, transposed(x_MK)
    assert col_scale is not None
    return x_MK, Quantized(next(got).t(), col_scale)


# ------------------------------------------------------------------------------- what linears are handed


class Gathered(Tensor):
    """A linear's input `[..., K]` of which only the float8 casts exist. See the module's docstring."""

    casts: Casts

    @staticmethod
    def __new__(cls, casts: Casts, shape: torch.Size, dtype: torch.dtype) -> Gathered:
        row, _ = casts
        assert row is not None
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=row.data.device)
        self.casts = casts
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["row_data", "row_scale"] + (["col_data", "col_scale"] if self.casts[1] is not None else [])
        return names, (self.shape, self.dtype)

    def __getattr__(self, name: str) -> Tensor:
        which, _, part = name.partition("_")
        if which in ("row", "col") and part in ("data", "scale"):
            return getattr(self.casts[which == "col"], part)
        raise AttributeError(name)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> Gathered:
        _, dtype = meta
        col = Quantized(inner["col_data"], inner["col_scale"]) if "col_data" in inner else None
        return Gathered((Quantized(inner["row_data"], inner["row_scale"]), col), outer_size, dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (x,) = args
            return Gathered(x.casts, x.shape, x.dtype)
        raise TypeError(
            f"{func} on an input that was gathered in float8: only Float8Linear reads those. Where a module "
            "prepared by PrepareFloat8ModuleInput does more with its input, gather in high precision with "
            "torch's PrepareModuleInput"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Gathered(shape={tuple(self.shape)}, dtype={self.dtype})"


class _GatherEdge(torch.autograd.Function):
    """The way of the gradient: a stand-in for the whole `x[M, K]`, whose gradient is summed over the ranks
    and scattered. It has one element, expanded; nothing reads it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: int, size: int, group: str) -> Tensor:
        ctx.where = pieces, size, group
        return x.new_zeros(1, 1).expand(x.shape[0] * size, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scatter_rows(grads[0], *ctx.where), None, None, None


class _Close(torch.autograd.Function):
    """The stand-in and the casts as one `Gathered`. (Compiled code cannot take a function that returns one
    and communicates in backward: hence two.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        edge: Tensor,
        row: Tensor,
        row_scale: Tensor,
        col: Tensor | None,
        col_scale: Tensor | None,
        shape: torch.Size,
    ) -> Tensor:
        ctx.edge_shape = edge.shape
        second = Quantized(col, col_scale) if col is not None and col_scale is not None else None
        return Gathered((Quantized(row, row_scale), second), shape, edge.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].reshape(ctx.edge_shape), *[None] * 5


class _Open(torch.autograd.Function):
    """The stand-in `[M, K]` again, for one linear."""

    @staticmethod
    def forward(ctx: Any, x: Gathered, data: Tensor) -> Tensor:
        ctx.shape = x.shape
        return data.new_zeros((1, 1), dtype=x.dtype).expand(data.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].reshape(ctx.shape), None


def open_gathered(x: Gathered) -> tuple[Tensor, Casts]:
    """A stand-in `[M, K]` for `x`, through which its gradient flows, and its casts."""
    row, _ = x.casts
    assert row is not None
    return _Open.apply(x, row.data), x.casts


def close_gathered(
    x: Tensor, casts: Casts, shape: torch.Size, *, pieces: int, size: int, group: str
) -> Tensor:
    """What linears are handed of the gathered tensor of `shape[..., K]`, given this rank's rows `x[M, K]` and
    the gathered casts.
    """
    row, col = casts
    assert row is not None
    edge = _GatherEdge.apply(x, pieces, size, group)
    return _Close.apply(edge, *row, *(col if col is not None else (None, None)), shape)
