"""Chooses the kernel that casts a tensor on a GPU.

`quantize.py` defines a cast and runs on a CPU. On a GPU of compute capability 8.9 or later it calls the
kernels here, which give the same bits with fewer passes over memory:

    block of the cast          kernel
    (FULL, FULL)               cast_tensor.py: one scale per tensor
    (1, FULL)                  cast_rows_columns.py: one scale per row
    (1, 128), (1, 32)          cast_lines.py
    (128, 128)                 cast_tiles.py

Plain PyTorch handles the rest: other blocks, casts without scales, tensors whose scales need another rank's
maxima, and everything under `use_kernels(False)` or with OCTAVO_KERNELS=0 in the environment.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from octavo.float8.distributed.tp_scales import ShardedAxis
from octavo.float8.recipe import FULL, Cast

LEAST_CAPABILITY = (8, 9)  # the first with a conversion to float8
GROUPS = (32, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (Tensor, torch.nn.Parameter)  # kernels cannot take other subclasses
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_enabled = os.environ.get("OCTAVO_KERNELS", "1") != "0"


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Scope in which kernels may or may not cast, e.g. to compare them with plain PyTorch."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def _device_supported(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None or not _HAVE_TRITON:
        return False  # a CPU build of torch has fake CUDA tensors, too
    properties = torch.cuda.get_device_properties(device)  # a constant to the compiler
    return (properties.major, properties.minor) >= LEAST_CAPABILITY


def _has_kernel(cast: Cast) -> bool:
    if not cast.scaled:
        return False
    rows, cols = cast.block
    if rows == 1:
        return cols == FULL or cols in GROUPS
    return cast.square and (rows == FULL or rows == 128)


def supports(x: Tensor, cast: Cast | None, sharded: ShardedAxis | None = None) -> bool:
    """Whether a kernel makes `cast` of `x[R, C]`; None means no cast. `sharded` as in `quantize`."""
    if not _enabled or not _device_supported(x.device) or type(x) not in _PLAIN:
        return False
    if x.dtype not in _DTYPES or x.numel() == 0:
        return False
    if cast is None:
        return True
    # Scales that span the sharded axis need a collective for the maxima.
    return _has_kernel(cast) and (sharded is None or cast.block[sharded.axis] != FULL)


Pair = tuple[Tensor, Tensor]


def cast_both(x: Tensor, row: Cast | None, col: Cast | None) -> tuple[Pair | None, Pair | None]:
    """`(data[R, C], scale)` for the cast `row`, and `(data[C, R], scale)` of the transpose for `col`,
    contiguous.

    Equal casts are made together. None for a cast of None.
    """
    if row is not None and col is not None and row != col:
        return cast_both(x, row, None)[0], cast_both(x, None, col)[1]
    cast = row or col
    assert cast is not None
    first, second = _launch(x.contiguous(), cast, row is not None, col is not None)
    return (first if row else None), (second if col else None)


def cast_with_amax(
    x: Tensor, amax: Tensor, cast: Cast, rows: bool, columns: bool
) -> tuple[Pair, Pair, Tensor, Tensor]:
    """`cast_both` with the one scale of `amax[1, 1]`; then x's own maximum, float32 `[1, 1]`, and the number
    of its saturated elements, int64.
    """
    from octavo.float8.kernels import ops  # triton, at its first use

    data, data_t, scale, maxima, saturated = ops.cast_by_given_scale(
        x.contiguous(), amax, cast.dtype, cast.scale.value, rows, columns
    )
    # Two tensors for the scales: the compiler refuses one that is given to an autograd function twice.
    return (data, scale), (data_t, scale.t()), maxima.amax().view(torch.float32).view(1, 1), saturated.sum()


def cast_by_amax(x: Tensor, amax: Tensor, cast: Cast) -> Tensor:
    """The float8 `data[R, C]` of x with the one scale of `amax[1, 1]`, which is not less than x's maximum."""
    from octavo.float8.kernels import ops  # triton, at its first use

    bits = amax.float().view(torch.int32).view(1)
    data, _, _ = ops.cast_by_tensor_with_maxima(
        x.contiguous(), bits, cast.dtype, cast.scale.value, True, False
    )
    return data


def cast_joined(xs: list[Tensor], cast: Cast, *, with_columns: bool) -> tuple[Pair, list[Pair]]:
    """The casts of `xs[R_i, C]` in one buffer, `(data[sum R_i, C], scale)`, and, if `with_columns`, the pair
    of each transpose. Blocks must not straddle two of `xs`, and none may be FULL rows.
    """
    from octavo.float8.kernels import ops  # triton, at its first use

    contiguous = [x.contiguous() for x in xs]
    data, scale, *rest = ops.cast_joined(
        contiguous, list(cast.block), cast.dtype, cast.scale.value, with_columns
    )
    if not with_columns:
        return (data, scale), []
    if cast.square:
        blocks = [-(-x.shape[0] // cast.block[0]) for x in xs]
        return (data, scale), [(t, s.t()) for t, s in zip(rest, scale.split(blocks), strict=True)]
    return (data, scale), list(zip(rest[::2], rest[1::2], strict=True))


def _launch(x: Tensor, cast: Cast, rows: bool, columns: bool) -> tuple[Pair, Pair]:
    from octavo.float8.kernels import ops  # triton, at its first use

    dtype, scales = cast.dtype, cast.scale.value
    if cast.square:
        if cast.block == (FULL, FULL):
            data, data_t, scale = ops.cast_by_tensor(x, dtype, scales, rows, columns)
        else:
            data, data_t, scale = ops.cast_by_tiles(x, cast.block[0], dtype, scales, rows, columns)
        return (data, scale), (data_t, scale.t())
    if cast.block == (1, FULL):
        data, scale, data_t, scale_t = ops.cast_by_rows(x, dtype, scales, rows, columns)
    else:
        data, scale, data_t, scale_t = ops.cast_by_lines(x, cast.block[1], dtype, scales, rows, columns)
    return (data, scale), (data_t, scale_t)
