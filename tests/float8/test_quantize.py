"""Casts against the formats' definitions in exact arithmetic, and the laws of casts."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8.quantize import (
    EPS,
    Quantized,
    block_amax,
    cast_data,
    dequantize,
    quantize,
    quantize_both,
    scale_values,
    scales_from_amax,
    to_float32,
    transposed,
)
from octavo.float8.recipe import FULL, RECIPES, Cast, ScaleFormat
from tests.float8.torchao_reference import same_bits

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# (exponent bits, mantissa bits, bias), and whether all-ones exponents are ordinary numbers but for the last
# code.
FORMATS = {E4M3: (4, 3, 7, True), E5M2: (5, 2, 15, False)}
BLOCKS = [(FULL, FULL), (1, FULL), (1, 128), (128, 128), (1, 32), (4, 8)]


def decode(code: int, dtype: torch.dtype) -> Fraction | float:
    """The value of one byte, from the definition of the format (OCP 8-bit floating point, revision 1.0)."""
    exponent_bits, mantissa_bits, bias, finite_top = FORMATS[dtype]
    sign = -1 if code >> 7 else 1
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    if exponent == 2**exponent_bits - 1:
        if finite_top and mantissa == 2**mantissa_bits - 1:
            return math.nan
        if not finite_top:
            return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return Fraction(sign * mantissa) * Fraction(2) ** (1 - bias - mantissa_bits)
    return Fraction(sign * (2**mantissa_bits + mantissa)) * Fraction(2) ** (exponent - bias - mantissa_bits)


def finite_values(dtype: torch.dtype) -> list[tuple[Fraction, int]]:
    """Every non-negative finite value with its code, ascending."""
    decoded = ((decode(code, dtype), code) for code in range(128))
    return sorted((value, code) for value, code in decoded if isinstance(value, Fraction))


def encode(x: float, dtype: torch.dtype) -> int:
    """The code nearest to x, ties to the even code, saturating: the definition, in exact arithmetic."""
    if math.isnan(x):
        return 0x7F
    values = finite_values(dtype)
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    magnitude = Fraction(values[-1][0]) if math.isinf(x) else abs(Fraction(x))
    _, _, code = min((abs(value - magnitude), code & 1, code) for value, code in values)
    return sign | code


@pytest.mark.parametrize("dtype", FORMATS)
def test_all_256_codes_have_the_formats_values(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    for values in (to_float32(codes.view(dtype)), to_float32(codes.t().contiguous().view(dtype).t())):
        for code, value in enumerate(values.flatten().tolist()):
            want = decode(code, dtype)
            assert value == want or (math.isnan(value) and math.isnan(want))


@pytest.mark.parametrize("dtype", FORMATS)
def test_conversion_rounds_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    values = [float(value) for value, _ in finite_values(dtype)]
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    largest = values[-1]
    points = [*values, *middles, largest * 1.01, largest * 1.1, largest * 4, 1e30, math.inf, math.nan]
    for middle in middles:
        points += [math.nextafter(middle, 0), math.nextafter(middle, math.inf)]
    smallest = values[1]
    points += [smallest / 2, smallest / 2 * (1 + 1e-6), smallest / 4, 1e-30, 0.0]
    points += [-p for p in points]
    x = torch.tensor([points], dtype=torch.float64).float()
    got = cast_data(x, torch.ones(1, 1), Cast(dtype, (FULL, FULL)))
    for value, code in zip(x[0].tolist(), got.view(torch.uint8)[0].tolist(), strict=True):
        want = encode(value, dtype)
        if math.isnan(value):
            assert code & 0x7F > 0x7C
            assert math.isnan(decode(code, dtype))
        else:
            assert code == want, f"{value}: {decode(code, dtype)} for {decode(want, dtype)}"


def oracle_scale(amax: float, cast: Cast) -> float:
    """A block's multiplier by definition, in exact arithmetic where that matters."""
    largest = 448 if cast.dtype == E4M3 else 57344
    if cast.scale in (ScaleFormat.E8M0, ScaleFormat.E8M0_FLOOR):
        if amax == 0:
            return 2.0**127
        if cast.scale is ScaleFormat.E8M0:  # the least power of two that takes amax into range
            exponent = math.ceil(math.log2(amax / largest)) - 1
            while Fraction(amax) > largest * Fraction(2) ** exponent:
                exponent += 1
        else:
            exponent = math.frexp(amax)[1] - 1 - (8 if cast.dtype == E4M3 else 15)
        return 2.0 ** -max(exponent, -127)
    s = torch.tensor(largest / max(amax, EPS), dtype=torch.float64).float().item()
    return 2.0 ** (math.frexp(s)[1] - 1) if cast.scale is ScaleFormat.POW2 else s


def oracle(x: Tensor, cast: Cast) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and multipliers of `x[R, C]`, block by block, in Python numbers."""
    rows, cols = x.shape
    block_rows, block_cols = (n if b == FULL else b for b, n in zip(cast.block, x.shape, strict=True))
    values = x.float().tolist()
    codes = [[0] * cols for _ in range(rows)]
    scales = []
    for top in range(0, rows, block_rows):
        scales.append([])
        for left in range(0, cols, block_cols):
            inside = [
                (r, c)
                for r in range(top, min(top + block_rows, rows))
                for c in range(left, min(left + block_cols, cols))
            ]
            s = oracle_scale(max(abs(values[r][c]) for r, c in inside), cast)
            scales[-1].append(s)
            for r, c in inside:
                product = torch.tensor(values[r][c] * s, dtype=torch.float64).float().item()
                codes[r][c] = encode(product, cast.dtype)
    return codes, scales


@pytest.mark.parametrize("scale", ScaleFormat)
@pytest.mark.parametrize("dtype", FORMATS)
@settings(max_examples=25)
@given(
    block=st.sampled_from([*BLOCKS[:2], (1, 32), (2, 4)]),
    rows=st.integers(1, 5),
    cols=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
    narrow=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_casts_equal_an_oracle_in_exact_arithmetic(
    dtype: torch.dtype,
    scale: ScaleFormat,
    block: tuple[int, int],
    rows: int,
    cols: int,
    exponent: int,
    seed: int,
    narrow: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g) * torch.exp2(torch.randint(-12, 3, (rows, cols), generator=g))
    x = (x * 2.0**exponent).to(narrow)
    x[torch.rand(rows, cols, generator=g) < 0.1] = 0
    cast = Cast(dtype, block, scale)
    got = quantize(x, cast)
    codes, scales = oracle(x, cast)
    assert got.data.view(torch.uint8).tolist() == codes
    assert scale_values(got.scale).tolist() == [
        [torch.tensor(1 / s, dtype=torch.float64).float().item() for s in line] for line in scales
    ]


@pytest.mark.parametrize("scale", ScaleFormat)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_becomes_finite(
    value: float, block: tuple[int, int], scale: ScaleFormat
) -> None:
    x = torch.randn(130, 140, generator=torch.Generator().manual_seed(1))
    x[1, 2] = value
    cast = Cast(E4M3, block, scale)
    back = dequantize(quantize(x, cast), block)
    assert not back[1, 2].isfinite()
    elsewhere = torch.ones_like(x, dtype=torch.bool)
    rows, cols = (n if b == FULL else b for b, n in zip(block, x.shape, strict=True))
    top, left = 1 // rows * rows, 2 // cols * cols
    elsewhere[top : top + rows, left : left + cols] = False
    assert bool(back[elsewhere].isfinite().all())


@pytest.mark.parametrize("block", [(FULL, FULL), (128, 128), (16, 16)])
def test_square_casts_commute_with_transposing(block: tuple[int, int]) -> None:
    x = torch.randn(70, 200, generator=torch.Generator().manual_seed(2)) * 3
    cast = Cast(E4M3, block)
    assert cast.square
    direct, turned = quantize(x.t(), cast), transposed(quantize(x, cast))
    assert same_bits(direct.data, turned.data)
    assert torch.equal(direct.scale, turned.scale)


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantize_both_is_two_casts(recipe: str) -> None:
    x = torch.randn(48, 160, generator=torch.Generator().manual_seed(3))
    row, col = RECIPES[recipe].output.a, RECIPES[recipe].grad_weight.b
    first, second = quantize_both(x, row, col)
    for got, cast, operand in ((first, row, x), (second, col, x.t())):
        if cast is None:
            assert torch.equal(got, operand)
        else:
            want = quantize(operand, cast)
            assert same_bits(got.data, want.data)
            assert torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (129, 31), (256, 128)])
def test_dequantising_errs_by_half_a_step_at_most(shape: tuple[int, int], block: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    q = quantize(x, Cast(E4M3, block))
    assert isinstance(q, Quantized)
    assert q.data.shape == x.shape
    rows, cols = (n if b == FULL else b for b, n in zip(block, shape, strict=True))
    assert q.scale.shape == (-(-shape[0] // rows), -(-shape[1] // cols))
    # 3 bits of mantissa: relative error 2**-4, or half of the least subnormal of a block whose amax is below
    # 5.
    error = (dequantize(q, block) - x).abs()
    assert bool((error <= (x.abs() * 2.0**-4).clamp(min=5 / 448 * 2.0**-10)).all())


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
@pytest.mark.parametrize("block", BLOCKS)
def test_empty_tensors_have_empty_casts(shape: tuple[int, int], block: tuple[int, int]) -> None:
    q = quantize(torch.empty(shape), Cast(E4M3, block))
    assert q.data.shape == shape
    assert bool(scale_values(q.scale).isfinite().all())


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("block", BLOCKS)
def test_layout_does_not_change_a_cast(block: tuple[int, int], layout: str) -> None:
    g = torch.Generator().manual_seed(5)
    x = {
        "transposed": lambda: torch.randn(64, 144, generator=g).t(),
        "strided": lambda: torch.randn(288, 128, generator=g)[::2, ::2],
        "expanded": lambda: torch.randn(144, 1, generator=g).expand(144, 64),
    }[layout]()
    cast = Cast(E4M3, block)
    assert same_bits(quantize(x, cast).data, quantize(x.contiguous(), cast).data)
    assert torch.equal(block_amax(x, block), block_amax(x.contiguous(), block))


def test_mx_rounding_up_never_saturates_and_rounding_down_may() -> None:
    x = torch.full((1, 32), 1.9)
    up, down = (quantize(x, Cast(E4M3, (1, 32), s)) for s in (ScaleFormat.E8M0, ScaleFormat.E8M0_FLOOR))
    assert dequantize(up, (1, 32)).max() == 1.875
    assert dequantize(down, (1, 32)).max() == 1.75
    assert up.scale.dtype == torch.uint8
    assert scale_values(torch.tensor([[0, 127, 254, 255]], dtype=torch.uint8)).tolist()[0][:3] == [
        2.0**-127,
        1.0,
        2.0**127,
    ]


@pytest.mark.parametrize("amax", [448.0, 448.00003, 1.75, 1.7500001, 2.0, 1e-45, 2.0**-126, 3.4e38, 0.0])
def test_mx_scales_at_the_edges(amax: float) -> None:
    for scale in (ScaleFormat.E8M0, ScaleFormat.E8M0_FLOOR):
        cast = Cast(E4M3, (1, 32), scale)
        s, code = scales_from_amax(torch.tensor([[amax]]), cast)
        assert s.item() == oracle_scale(torch.tensor(amax).item(), cast)
        assert scale_values(code).item() == 1 / s.item()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("block", BLOCKS)
def test_without_scales_a_cast_is_the_types_own(dtype: torch.dtype, block: tuple[int, int]) -> None:
    """The definition of `scaled=False`: 1 everywhere, saturated above, flushed to zero below."""
    limit = torch.finfo(dtype).max
    x_RC = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(
        -9, 7
    ).repeat(8)
    q = quantize(x_RC, Cast(dtype, block, scaled=False))
    assert bool((q.scale == 1).all())
    assert same_bits(q.data, x_RC.clamp(-limit, limit).to(dtype))
    assert torch.equal(dequantize(q, block), q.data.float())
    assert bool((q.data.float()[x_RC.abs() < 2.0**-18] == 0).all())
