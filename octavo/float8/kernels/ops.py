"""The kernels as PyTorch operators, callable from eager code and traceable by the compiler.

They are opaque to the compiler. So it merges equal calls, such as the casts of one input by several linears,
and never recomputes one in backward: what a cast returns to forward is saved. (`torch.library.triton_op`
would show it the launches and their empty outputs, which it does not merge.) Each operator has a function
that gives the shapes of its results, so that a graph can be traced without a GPU.

Importing this file imports triton. Casts return `(data, scale, data_t, scale_t)`, or `(data, data_t, scale)`
if blocks are square, where the transpose's scales are `scale` transposed. See
`octavo/float8/kernels/__init__.py` for the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.float8.kernels import adamw_cast as adamw
from octavo.float8.kernels import add_rms_norm as norm
from octavo.float8.kernels.add_rms_norm import add_rms_norm, add_rms_norm_backward, rms_norm
from octavo.float8.kernels.cast_given_maxima import cast_given_maxima
from octavo.float8.kernels.cast_given_scale import cast_given_scale, programs_of
from octavo.float8.kernels.cast_lines import cast_lines
from octavo.float8.kernels.cast_rows_columns import cast_columns, cast_rows, column_maxima
from octavo.float8.kernels.cast_tensor import cast_tensor, magnitudes
from octavo.float8.kernels.cast_tiles import cast_tiles
from octavo.float8.kernels.kernel_launch import empty_scale
from octavo.float8.kernels.kernel_maxima import WithMaxima, empty_with_maxima
from octavo.float8.kernels.silu_mul import silu_mul, silu_mul_backward

RowColumnCasts = tuple[Tensor, Tensor, Tensor, Tensor]
SquareCasts = tuple[Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


_LIBRARY = torch.library.Library("octavo", "FRAGMENT")
LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""The name of each operator -> the function that launches its kernels."""


def _operator(
    name: str, shapes: Callable[..., Any], writes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as an operator with the fake implementation `shapes`; it mutates `writes`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def launch(first: Tensor | list[Tensor], *rest: Any) -> Any:
            x = first if isinstance(first, Tensor) else first[0]
            with torch.cuda.device_of(x):  # launch on its GPU, whichever is the current one
                return function(first, *rest)

        schema = torch.library.infer_schema(function, mutates_args=writes)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LAUNCHERS[name] = function
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"octavo::{name}", shapes, lib=_LIBRARY)
        operator: Callable[..., Any] = getattr(torch.ops.octavo, name).default
        return operator

    return register


def _pair(x: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    data = x.new_empty((M, K) if rows else (0, 0), dtype=dtype)
    return data, x.new_empty((K, M) if columns else (0, 0), dtype=dtype)


def _tensor_shapes(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> SquareCasts:
    return *_pair(x, dtype, rows, columns), empty_scale(x, (1, 1), scales)


def _tile_shapes(
    x: Tensor, side: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> SquareCasts:
    M, K = x.shape
    return *_pair(x, dtype, rows, columns), empty_scale(x, (-(-M // side), -(-K // side)), scales)


def _row_shapes(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> RowColumnCasts:
    M, K = x.shape
    data, data_t = _pair(x, dtype, rows, columns)
    scale = empty_scale(x, (M, 1) if rows else (0, 0), scales)
    return data, scale, data_t, empty_scale(x, (K, 1) if columns else (0, 0), scales)


def _line_shapes(
    x: Tensor, group: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> RowColumnCasts:
    M, K = x.shape
    data, data_t = _pair(x, dtype, rows, columns)
    scale = empty_scale(x, (M, -(-K // group)) if rows else (0, 0), scales)
    return data, scale, data_t, empty_scale(x, (K, -(-M // group)) if columns else (0, 0), scales)


@_operator("cast_by_tensor", _tensor_shapes)
def cast_by_tensor(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> SquareCasts:
    """`cast_tensor` with the maxima of x itself."""
    return cast_tensor(x, magnitudes(x), dtype, scales, rows, columns)


@_operator("cast_by_rows", _row_shapes)
def cast_by_rows(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> RowColumnCasts:
    """One scale per row, `[M, 1]`, and for `data_t` one per column of x, `[K, 1]`."""
    if rows:
        data, scale, maxima = cast_rows(x, dtype, scales, columns)
    else:
        data, scale = x.new_empty((0, 0), dtype=dtype), empty_scale(x, (0, 0), scales)
        maxima = column_maxima(x)
    if columns:
        data_t, scale_t = cast_columns(x, maxima, dtype, scales)
    else:
        data_t, scale_t = x.new_empty((0, 0), dtype=dtype), empty_scale(x, (0, 0), scales)
    return data, scale, data_t, scale_t


@_operator("cast_by_tiles", _tile_shapes)
def cast_by_tiles(
    x: Tensor, side: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> SquareCasts:
    """One scale per tile of `side x side`, `[M / side, K / side]`."""
    return cast_tiles(x, side, dtype, scales, rows, columns)


@_operator("cast_by_lines", _line_shapes)
def cast_by_lines(
    x: Tensor, group: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> RowColumnCasts:
    """One scale per `group` elements of a row, `[M, K / group]`, and of a column, `[K, M / group]`."""
    return cast_lines(x, group, dtype, scales, rows, columns)


def _given_scale_shapes(
    x: Tensor, amax: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> Five:
    partial = x.new_empty((programs_of(*x.shape),), dtype=torch.int32)
    cast = _pair(x, dtype, rows, columns)
    return *cast, empty_scale(x, (1, 1), scales), partial, torch.empty_like(partial)


def _given_maxima_shapes(
    x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, scales: str
) -> RowColumnCasts:
    return _row_shapes(x, dtype, scales, True, True)


def _tensor_given_shapes(
    x: Tensor, maxima: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> SquareCasts:
    return _tensor_shapes(x, dtype, scales, rows, columns)


cast_by_given_scale = _operator("cast_by_given_scale", _given_scale_shapes)(cast_given_scale)
cast_with_maxima = _operator("cast_with_maxima", _given_maxima_shapes)(cast_given_maxima)
cast_by_tensor_with_maxima = _operator("cast_by_tensor_with_maxima", _tensor_given_shapes)(cast_tensor)


def _joined_shapes(
    xs: list[Tensor], block: list[int], dtype: torch.dtype, scales: str, columns: bool
) -> list[Tensor]:
    rows, group = block
    N, K = sum(x.shape[0] for x in xs), xs[0].shape[1]
    across = 1 if group < 0 else -(-K // group)
    results = [xs[0].new_empty((N, K), dtype=dtype), empty_scale(xs[0], (-(-N // rows), across), scales)]
    for x in xs if columns else []:
        results.append(x.new_empty((K, x.shape[0]), dtype=dtype))
        if rows == 1:
            results.append(empty_scale(x, (K, 1 if group < 0 else -(-x.shape[0] // group)), scales))
    return results


@_operator("cast_joined", _joined_shapes)
def cast_joined(
    xs: list[Tensor], block: list[int], dtype: torch.dtype, scales: str, columns: bool
) -> list[Tensor]:
    """Casts `xs[N_i, K]` into one buffer: `data[N, K]` and `scale`; then `data_t[K, N_i]` of each, with its
    `scale_t` unless blocks are square. `block`: (1, -1), (1, group) or (side, side); -1 is a whole row. No
    block may straddle two of `xs`.
    """
    rows, group = block
    data, scale, *_ = results = _joined_shapes(xs, block, torch.uint8, scales, False)
    start = 0
    for x in xs:
        N = x.shape[0]
        out = data.narrow(0, start, N), scale.narrow(0, start // rows, -(-N // rows))
        if rows > 1:
            _, data_t, _ = cast_tiles(x, rows, dtype, scales, True, columns, out)
            results += [data_t] if columns else []
        elif group > 0:
            _, _, *transposed = cast_lines(x, group, dtype, scales, True, columns, out)
            results += transposed if columns else []
        else:
            *_, maxima = cast_rows(x, dtype, scales, columns, out)
            results += cast_columns(x, maxima, dtype, scales) if columns else []
        start += N
    return [data.view(dtype), *results[1:]]


# ---------------------------------------------------------------- producers of tensors that are cast next


def _silu_mul_shapes(a: Tensor, b: Tensor) -> WithMaxima:
    return empty_with_maxima(a, *a.shape)


silu_mul_with_maxima = _operator("silu_mul", _silu_mul_shapes)(silu_mul)


def _again_shapes(a: Tensor, b: Tensor, after: Tensor) -> WithMaxima:
    return empty_with_maxima(a, *a.shape)


@_operator("silu_mul_again", _again_shapes)
def silu_mul_again_with_maxima(a: Tensor, b: Tensor, after: Tensor) -> WithMaxima:
    """`silu_mul` in backward. `after`, a gradient, keeps the compiler from merging it with forward's."""
    return silu_mul(a, b)


def _silu_mul_backward_shapes(dh: Tensor, a: Tensor, b: Tensor) -> Six:
    return *empty_with_maxima(a, *a.shape), *empty_with_maxima(a, *a.shape)


@_operator("silu_mul_backward", _silu_mul_backward_shapes)
def silu_mul_backward_with_maxima(dh: Tensor, a: Tensor, b: Tensor) -> Six:
    """`da` and maxima of its rows and columns, then `db` and its."""
    da, db = silu_mul_backward(dh, a, b)
    return *da, *db


def _norm_shapes(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> Five:
    return torch.empty_like(x), x.new_empty((x.shape[0],), dtype=torch.float32), *norm._empty(x)


@_operator("add_rms_norm", _norm_shapes)
def add_rms_norm_with_maxima(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> Five:
    """`h`, `rms`, `y` and maxima of y's rows and columns: see `add_rms_norm.py`."""
    h, rms, y = add_rms_norm(x, residual, w, eps)
    return h, rms, *y


def _norm_backward_shapes(
    dy: Tensor, dh: Tensor, h: Tensor, rms: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *norm._empty(h), h.new_empty((h.shape[1],), dtype=torch.float32)


@_operator("add_rms_norm_backward", _norm_backward_shapes)
def add_rms_norm_backward_with_maxima(
    dy: Tensor, dh: Tensor, h: Tensor, rms: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dx` and maxima of its rows and columns, and `dw`."""
    dx, dw = add_rms_norm_backward(dy, dh, h, rms, w)
    return *dx, dw


def _norm_alone_shapes(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty((x.shape[0],), dtype=torch.float32), *norm._empty(x)


@_operator("rms_norm", _norm_alone_shapes)
def rms_norm_with_maxima(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms`, `y` and maxima of y's rows and columns, without a residual."""
    rms, y = rms_norm(x, w, eps)
    return rms, *y


# ---------------------------------------------------------- optimizer steps that also cast the new weights

_UPDATED = ("w", "m", "v")


def _adamw_maxima_shapes(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], source: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    tiles = -(-w.shape[0] // adamw.TILE_M), -(-w.shape[1] // adamw.TILE_K)
    rows = w.new_empty((tiles[1], w.shape[0]), dtype=torch.int32)
    return rows, w.new_empty((tiles[0], w.shape[1]), dtype=torch.int32)


@_operator("adamw_maxima", _adamw_maxima_shapes, _UPDATED)
def adamw_with_maxima(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], source: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Steps w, m and v in place; returns maxima of w's rows and columns. `step`: fields of a `Step`."""
    _, rows, columns = adamw.adamw_maxima(w, grad, m, v, adamw.Step(*step), source)
    return rows, columns


def _adamw_squares_shapes(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], side: int, dtype: torch.dtype,
    scales: str, source: torch.dtype | None,
) -> SquareCasts:  # fmt: skip
    return _tile_shapes(w, side, dtype, scales, True, True)


@_operator("adamw_squares", _adamw_squares_shapes, _UPDATED)
def adamw_with_squares(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], side: int, dtype: torch.dtype,
    scales: str, source: torch.dtype | None,
) -> SquareCasts:  # fmt: skip
    """Steps w, m and v in place; returns `cast_by_tiles` of the new w."""
    return adamw.adamw_squares(w, grad, m, v, adamw.Step(*step), side, dtype, scales, source)
