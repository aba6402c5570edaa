"""Compares kernels with their references, on any device.

Importing this imports triton. On a CPU, TRITON_INTERPRET=1 must be set first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.float8.kernels import (
    cast_given_maxima,
    cast_lines,
    cast_rows_columns,
    cast_tensor,
    cast_tiles,
)
from octavo.float8.kernels.kernel_launch import Untuned, cast_constants
from octavo.float8.kernels.numerics import scales_of, to_float8, to_float32
from octavo.float8.quantize import Quantized, cast_data, quantize_both, scales_from_amax
from octavo.float8.recipe import FULL, Cast, ScaleFormat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOAT8 = (E4M3, E5M2)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALES = tuple(ScaleFormat)
FEATURES = ("plain", "nan", "inf", "zeros", "tiny", "huge", "spread")
SHAPES = [(1, 1), (1, 300), (257, 1), (37, 65), (128, 128), (130, 200), (64, 256)]


def pairs(shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Every shape with bfloat16, and the first with every dtype: cases of `("shape", "dtype")`."""
    return [*((shape, DTYPES[0]) for shape in shapes), *((shapes[0], dtype) for dtype in DTYPES[1:])]


Casts = tuple[Tensor, Tensor, Tensor, Tensor]  # data, scale, data_t, scale_t


@dataclass(frozen=True)
class Kernel:
    """A cast by kernels: the block of the reference, and how it is run for rows, columns or both."""

    name: str
    block: tuple[int, int]
    run: Callable[[Tensor, torch.dtype, str, bool, bool], Casts]


def _tensor(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Casts:
    data, data_t, scale = cast_tensor.cast_tensor(x, cast_tensor.magnitudes(x), dtype, scales, rows, columns)
    return data, scale, data_t, scale.t()


def _rows(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Casts:
    none = x.new_empty(0)
    data, scale, maxima = none, none, None
    if rows:
        data, scale, maxima = cast_rows_columns.cast_rows(x, dtype, scales, columns)
    if not columns:
        return data, scale, none, none
    if maxima is None:
        maxima = cast_rows_columns.column_maxima(x)
    return data, scale, *cast_rows_columns.cast_columns(x, maxima, dtype, scales)


def _tiles(x: Tensor, dtype: torch.dtype, scales: str, rows: bool, columns: bool) -> Casts:
    data, data_t, scale = cast_tiles.cast_tiles(x, 128, dtype, scales, rows, columns)
    return data, scale, data_t, scale.t()


def _lines(group: int) -> Callable[[Tensor, torch.dtype, str, bool, bool], Casts]:
    return lambda x, *how: cast_lines.cast_lines(x, group, *how)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("tensor", (FULL, FULL), _tensor),
        Kernel("rows", (1, FULL), _rows),
        Kernel("tiles", (128, 128), _tiles),
        Kernel("lines128", (1, 128), _lines(128)),
        Kernel("lines32", (1, 32), _lines(32)),
    )
}


def make_x(shape: tuple[int, int], dtype: torch.dtype, feature: str = "plain", seed: int = 0) -> Tensor:
    """A tensor that casts find hard. Made on a CPU, so that every device gets the same."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    some = torch.rand(shape, generator=g) < 0.02
    some[0, 0] = True
    if feature == "nan":
        x[some] = torch.nan
    elif feature == "inf":
        x = torch.where(some, torch.inf * x.sign(), x)
    elif feature == "zeros":
        x[::2] = 0.0
        x[:, ::3] = -0.0
    elif feature == "tiny":  # subnormal in the input's dtype, and amax below EPS
        x *= torch.finfo(dtype).smallest_normal * 4
    elif feature == "huge":
        x = (x * torch.finfo(dtype).max / 4).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    elif feature == "spread":  # columns and rows of different sizes, and values between float8's steps
        x *= 2.0 ** torch.randint(-6, 7, shape[:1], generator=g)[:, None]
        x *= 2.0 ** torch.randint(-6, 7, shape[1:], generator=g)
        x[some] = 1.0625
    return x.to(dtype)


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """Same shape, dtype and bits; any NaN is as good as another."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    got, want = got.contiguous().cpu(), want.contiguous().cpu()
    if got.dtype in FLOAT8:
        values, wanted = got.float(), want.float()
        bits, wanted_bits = got.view(torch.uint8), want.view(torch.uint8)
    else:
        values, wanted = got, want
        kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[got.element_size()]
        bits, wanted_bits = got.view(kind), want.view(kind)
    same = (bits == wanted_bits) | (values.isnan() & wanted.isnan())
    if not same.all():
        at = tuple((~same).nonzero()[0].tolist())
        count = int((~same).sum())
        raise AssertionError(f"{what}: {count} differ, first at {at}: {values[at]}, not {wanted[at]}")


def check_cast(
    kernel: Kernel,
    x: Tensor,
    dtype: torch.dtype,
    scales: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
) -> None:
    """The kernel's casts of x equal those of `quantize_both`, computed on a CPU."""
    cast = Cast(dtype, kernel.block, scales)
    first, second = quantize_both(x.cpu(), cast, cast)
    assert isinstance(first, Quantized)
    assert isinstance(second, Quantized)
    data, scale, data_t, scale_t = kernel.run(x, dtype, scales.value, rows, columns)
    if rows:
        assert_same(data, first.data, "data")
        assert_same(scale, first.scale, "scale")
    if columns:
        assert_same(data_t, second.data, "data_t")
        assert_same(scale_t, second.scale, "scale_t")


def check_maxima(x: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Maxima handed over with x are x's, and so casts made with them are its casts: `check_given_maxima`."""
    assert_same(rows.amax(0).view(torch.float32), x.cpu().float().abs().amax(1), "maxima of rows")
    assert_same(columns.amax(0).view(torch.float32), x.cpu().float().abs().amax(0), "maxima of columns")


def check_given_maxima(x: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Maxima handed over with x are x's, and casts made with them are its casts, made here."""
    check_maxima(x, rows, columns)
    for dtype, scales in ((E4M3, ScaleFormat.POW2), (E5M2, ScaleFormat.FP32)):
        cast = Cast(dtype, (1, FULL), scales)
        casts = cast_given_maxima.cast_given_maxima(x, rows, columns, dtype, scales.value)
        wanted = [part for q in quantize_both(x.cpu(), cast, cast) for part in q]
        for got, want, what in zip(casts, wanted, ("data", "scale", "data_t", "scale_t"), strict=True):
            assert_same(got, want, what)


# Every tuned kernel: its file, its name, its configurations, and the casts that start it.
TUNED: list[tuple[ModuleType, str, tuple, tuple[str, ...]]] = [
    (cast_tensor, "_magnitudes", cast_tensor.CONFIGS_MAGNITUDES, ("tensor",)),
    (cast_tensor, "_cast_tensor", cast_tensor.CONFIGS_CAST, ("tensor",)),
    (cast_tiles, "_cast_tiles", cast_tiles.CONFIGS, ("tiles",)),
    (cast_lines, "_cast_lines", cast_lines.CONFIGS, ("lines128", "lines32")),
    (cast_rows_columns, "_cast_rows", cast_rows_columns.CONFIGS_ROWS, ("rows",)),
    (cast_rows_columns, "_cast_wide_rows", cast_rows_columns.CONFIGS_WIDE_ROWS, ("wide rows",)),
    (cast_rows_columns, "_column_maxima", cast_rows_columns.CONFIGS_MAXIMA, ("columns",)),
    (cast_rows_columns, "_cast_columns", cast_rows_columns.CONFIGS_COLUMNS, ("rows",)),
]
CONFIGURATIONS = [
    pytest.param(module, name, config, user, id=f"{name[1:]}-{i}-{user}")
    for module, name, configs, users in TUNED
    for i, config in enumerate(configs)
    for user in users
]


@contextmanager
def only(module: ModuleType, name: str, config: dict) -> Iterator[None]:
    """The kernel runs with this configuration, whatever else it has."""
    tuned = getattr(module, name)
    setattr(module, name, Untuned(tuned.fn, config))
    try:
        yield
    finally:
        setattr(module, name, tuned)


def check_configuration(module: ModuleType, name: str, config: dict, user: str, device: str) -> None:
    """Tiles that divide the matrix and tiles that don't, with one configuration."""
    # Rows long enough that the configurations of `_cast_rows` hold different numbers of them at a time.
    ragged = (37, 1000) if user == "rows" else (130, 200)
    with only(module, name, config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cast_rows_columns, "strip_of", lambda M, K: 8 if user == "wide rows" else 32)
        for shape, feature in ((ragged, "spread"), ((128, 256), "nan")):
            x = make_x(shape, torch.bfloat16, feature).to(device)
            if user == "columns":
                check_cast(KERNELS["rows"], x, E4M3, ScaleFormat.POW2, rows=False)
            elif user == "wide rows":
                patch.setattr(cast_rows_columns, "WIDEST", 64)
                check_cast(KERNELS["rows"], x, E4M3, ScaleFormat.POW2)
            else:
                scales = ScaleFormat.E8M0 if user == "lines32" else ScaleFormat.FP32
                check_cast(KERNELS[user], x, E4M3, scales)


# ------------------------------------------------------------------------------------- the arithmetic alone


@triton.jit
def _convert(x_ptr, out_ptr, N, MANTISSA: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = to_float32(tl.load(x_ptr + i, mask=i < N, other=0.0))
    tl.store(out_ptr + i, to_float8(x, MANTISSA), mask=i < N)


@triton.jit
def _widen(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, to_float32(tl.load(x_ptr + i)))


@triton.jit
def _scales(amax_ptr, s_ptr, scale_ptr, N, MANTISSA: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s, scale = scales_of(tl.load(amax_ptr + i, mask=i < N, other=0), MANTISSA, SCALES)
    tl.store(s_ptr + i, s, mask=i < N)
    tl.store(scale_ptr + i, scale, mask=i < N)


def check_conversion(values: Tensor, dtype: torch.dtype) -> None:
    """`to_float8` of flat `values` equals the reference's conversion."""
    out = torch.empty_like(values, dtype=torch.uint8)
    grid = (triton.cdiv(values.numel(), 8192),)
    mantissa = cast_constants(dtype, "fp32")["MANTISSA"]
    _convert[grid](values, out, values.numel(), MANTISSA=mantissa, BLOCK=8192)
    want = cast_data(values.cpu()[None], torch.ones(1, 1), Cast(dtype, (FULL, FULL)))[0]
    assert_same(out.view(dtype), want, "codes")


def check_widening(device: str) -> None:
    """Every value of bfloat16 and float16 as float32, subnormal numbers too."""
    for dtype in (torch.bfloat16, torch.float16):
        values = every_bfloat16(device).view(dtype)
        out = torch.empty(65536, device=device)
        _widen[(8,)](values, out, BLOCK=8192)
        assert_same(out, values.cpu().float(), str(dtype))


def check_scales(amax: Tensor, dtype: torch.dtype, scales: ScaleFormat) -> None:
    """`scales_of` of flat float32 `amax` equals `scales_from_amax`."""
    s = torch.empty_like(amax)
    scale = torch.empty_like(amax, dtype=torch.uint8 if scales.one_byte else torch.float32)
    grid = (triton.cdiv(amax.numel(), 8192),)
    bits = amax.view(torch.int32)
    _scales[grid](bits, s, scale, amax.numel(), BLOCK=8192, **cast_constants(dtype, scales.value))
    want_s, want_scale = scales_from_amax(amax.cpu(), Cast(dtype, (FULL, FULL), scales))
    assert_same(s, want_s, "s")
    assert_same(scale, want_scale, "scale")


def every_bfloat16(device: str) -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)


def float32_points(device: str, count: int, non_negative: bool = False) -> Tensor:
    """Random bits, and both neighbours of every float8 value and of the middle of every two."""
    g = torch.Generator().manual_seed(7)
    random = torch.randint(-(2**31), 2**31, (count,), generator=g).to(torch.int32).view(torch.float32)
    points = [random]
    for dtype in FLOAT8:
        values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        values = values[values.isfinite()].sort().values
        both = torch.cat([values, (values[1:] + values[:-1]) / 2])
        points += [both, both.nextafter(torch.tensor(torch.inf)), both.nextafter(torch.tensor(-torch.inf))]
    all_points = torch.cat(points)
    return (all_points.abs() if non_negative else all_points).to(device)
