"""The kernels as PyTorch operators, which eager code calls and compiled code sees through.

`triton_op` shows the compiler the kernels themselves, so that it allocates and launches them as it does its
own. Under Triton's interpreter, which the compiler knows nothing of, they are opaque custom operators. The
shapes of the results are stated for both, so that a graph can be traced on a machine without a GPU.

Importing this file imports triton: `octavo/float8/casts/gpu_cast.py` does it when the first tensor comes.

All casts take contiguous `x[M, K]` of bfloat16, float16 or float32. `dtype` is torch.float8_e4m3fn or
torch.float8_e5m2, `scales` a key of `SCALE_FORMATS`. They return `(data[M, K], scale, data_t[K, M],
scale_t)`, or `(data[M, K], data_t[K, M], scale)` where blocks are square, and the transpose's scales are
`scale` transposed. What `rows` or `columns` does not ask for is empty. The operators at the end make tensors
that are to be cast, with the maxima for it.
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
from octavo.float8.kernels.kernel_maxima import Made, empty_with_maxima
from octavo.float8.kernels.numerics import INTERPRETING, empty_scale
from octavo.float8.kernels.rope_backward import rope_backward
from octavo.float8.kernels.silu_mul import silu_mul, silu_mul_backward
from octavo.float8.kernels.transpose_rows import transpose_rows, value_maxima

Both = tuple[Tensor, Tensor, Tensor, Tensor]
Square = tuple[Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _operator(
    name: str, shapes: Callable[..., Any], writes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function whose results `shapes` states, and which writes to the arguments `writes`."""
    make: Any = torch.library.custom_op if INTERPRETING else torch.library.triton_op

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = make(f"octavo::{name}", function, mutates_args=writes)
        operator.register_fake(shapes)
        return operator

    return register


def _pair(x: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    data = x.new_empty((M, K) if rows else (0, 0), dtype=dtype)
    return data, x.new_empty((K, M) if columns else (0, 0), dtype=dtype)


def _tensor_shapes(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Square:
    return *_pair(x, dtype, rows, columns), empty_scale(x, (1, 1), scales)


def _tile_shapes(x: Tensor, side: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Square:
    M, K = x.shape
    return *_pair(x, dtype, rows, columns), empty_scale(x, (-(-M // side), -(-K // side)), scales)


def _row_shapes(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Both:
    M, K = x.shape
    data, data_t = _pair(x, dtype, rows, columns)
    scale = empty_scale(x, (M, 1) if rows else (0, 0), scales)
    return data, scale, data_t, empty_scale(x, (K, 1) if columns else (0, 0), scales)


def _line_shapes(x: Tensor, group: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Both:
    M, K = x.shape
    data, data_t = _pair(x, dtype, rows, columns)
    scale = empty_scale(x, (M, -(-K // group)) if rows else (0, 0), scales)
    return data, scale, data_t, empty_scale(x, (K, -(-M // group)) if columns else (0, 0), scales)


@_operator("cast_by_tensor", _tensor_shapes)
def cast_by_tensor(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Square:
    """One scale for the tensor, `[1, 1]`."""
    return cast_tensor(x, magnitudes(x), dtype, scales, rows, columns)


@_operator("cast_by_tiles", _tile_shapes)
def cast_by_tiles(x: Tensor, side: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Square:
    """One scale for a square of `side`, `[M / side, K / side]`."""
    return cast_tiles(x, side, dtype, scales, rows, columns)


@_operator("cast_by_rows", _row_shapes)
def cast_by_rows(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Both:
    """One scale a row, `[M, 1]`; for `data_t` one a row of its own, `[K, 1]`."""
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


@_operator("cast_by_lines", _line_shapes)
def cast_by_lines(x: Tensor, group: int, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Both:
    """One scale for `group` elements of a row, `[M, K / group]`; `data_t` likewise, `[K, M / group]`."""
    return cast_lines(x, group, dtype, scales, rows, columns)


def _given_scale_shapes(
    x: Tensor, amax: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> Five:
    partial = x.new_empty((programs_of(*x.shape),), dtype=torch.int32)
    cast = _pair(x, dtype, rows, columns)
    return *cast, empty_scale(x, (1, 1), scales), partial, torch.empty_like(partial)


@_operator("cast_by_given_scale", _given_scale_shapes)
def cast_by_given_scale(
    x: Tensor, amax: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> Five:
    """One scale for the tensor, of `amax[1, 1]`, and partial maxima and counts: see `cast_given_scale.py`."""
    return cast_given_scale(x, amax, dtype, scales, rows, columns)


def _transposed_shapes(data: Tensor, scale: Tensor, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    M, K = data.shape
    return data.new_empty((K, M)), scale.new_empty((K, 1))


@_operator("transpose_float8_rows", _transposed_shapes)
def transpose_float8_rows(data: Tensor, scale: Tensor, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`data[M, K]` with power-of-two `scale[M, 1]` as `(data_t[K, M], scale_t[K, 1])`; see
    `transpose_rows.py`.

    `maxima` are of the original's columns, as `cast_rows` gives them; without, those of the float8 values.
    """
    return transpose_rows(data, scale, value_maxima(data, scale) if maxima is None else maxima)


# --------------------------------------------------------------- makers of tensors that are about to be cast


def _given_shapes(x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, scales: str) -> Both:
    return _row_shapes(x, dtype, scales, True, True)


@_operator("cast_with_maxima", _given_shapes)
def cast_with_maxima(x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, scales: str) -> Both:
    """`cast_by_rows` of x whose maxima are known: see `cast_given_maxima.py`."""
    return cast_given_maxima(x, rows, columns, dtype, scales)


def _tensor_given_shapes(
    x: Tensor, maxima: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> Square:
    return _tensor_shapes(x, dtype, scales, rows, columns)


@_operator("cast_by_tensor_with_maxima", _tensor_given_shapes)
def cast_by_tensor_with_maxima(
    x: Tensor, maxima: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool
) -> Square:
    """`cast_by_tensor` of x whose maxima `[P]`, P at most `cast_tensor.MAX_PROGRAMS`, are known."""
    return cast_tensor(x, maxima, dtype, scales, rows, columns)


def _silu_mul_shapes(a: Tensor, b: Tensor) -> Square:
    return empty_with_maxima(a, *a.shape)


@_operator("silu_mul", _silu_mul_shapes)
def silu_mul_with_maxima(a: Tensor, b: Tensor) -> Square:
    """`h[M, K]`, and maxima of its rows and columns: see `silu_mul.py`."""
    return silu_mul(a, b)


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _silu_mul_backward_shapes(dh: Tensor, a: Tensor, b: Tensor) -> Six:
    return *empty_with_maxima(a, *a.shape), *empty_with_maxima(a, *a.shape)


@_operator("silu_mul_backward", _silu_mul_backward_shapes)
def silu_mul_backward_with_maxima(dh: Tensor, a: Tensor, b: Tensor) -> Six:
    """`da` and maxima of its rows and columns, then `db` and its."""
    da, db = silu_mul_backward(dh, a, b)
    return *da, *db


def _rope_shapes(dy: Tensor, cos: Tensor, sin: Tensor) -> Made:
    B, S, H, E = dy.shape
    return empty_with_maxima(dy, B * S, H * E)


@_operator("rope_backward", _rope_shapes)
def rope_backward_with_maxima(dy: Tensor, cos: Tensor, sin: Tensor) -> Made:
    """`dx[B S, H E]`, and maxima of its rows and columns: see `rope_backward.py`."""
    return rope_backward(dy, cos, sin)


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


# ------------------------------------------------------- optimizer steps that make the float8 weights as well

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
    """Steps w, m and v; maxima of w's rows and columns. `step`: the numbers of `adamw_cast.Step`."""
    _, rows, columns = adamw.adamw_maxima(w, grad, m, v, adamw.Step(*step), source)
    return rows, columns


def _adamw_squares_shapes(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], side: int, dtype: torch.dtype,
    scales: str, source: torch.dtype | None,
) -> Square:  # fmt: skip
    return _tile_shapes(w, side, dtype, scales, True, True)


@_operator("adamw_squares", _adamw_squares_shapes, _UPDATED)
def adamw_with_squares(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], side: int, dtype: torch.dtype,
    scales: str, source: torch.dtype | None,
) -> Square:  # fmt: skip
    """Steps w, m and v; what `cast_by_tiles` gives of the new w."""
    return adamw.adamw_squares(w, grad, m, v, adamw.Step(*step), side, dtype, scales, source)


def _adamw_given_shapes(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], amax: Tensor, dtype: torch.dtype,
    scales: str, source: torch.dtype | None,
) -> Five:  # fmt: skip
    (rows, _) = _adamw_maxima_shapes(w, grad, m, v, step, source)
    partial = w.new_empty((rows.shape[0] * -(-w.shape[0] // adamw.TILE_M),), dtype=torch.int32)
    return *_pair(w, dtype, True, True), empty_scale(w, (1, 1), scales), partial, torch.empty_like(partial)


@_operator("adamw_given_scale", _adamw_given_shapes, _UPDATED)
def adamw_with_given_scale(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: list[float], amax: Tensor, dtype: torch.dtype,
    scales: str, source: torch.dtype | None,
) -> Five:  # fmt: skip
    """Steps w, m and v; what `cast_by_given_scale` gives of the new w."""
    return adamw.adamw_given_scale(w, grad, m, v, adamw.Step(*step), amax, dtype, scales, source)


def _norm_alone_shapes(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty((x.shape[0],), dtype=torch.float32), *norm._empty(x)


@_operator("rms_norm", _norm_alone_shapes)
def rms_norm_with_maxima(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms`, `y` and maxima of y's rows and columns, without a residual."""
    rms, y = rms_norm(x, w, eps)
    return rms, *y
