"""The numbers are torchao's, bit for bit: a user who moves over needs no new convergence study.

The law is bitwise where M, K and N are multiples of 16. Elsewhere the matrix library sums in an order that
depends on the operands' layout, and results agree to 1e-6 of their norm.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8.quantize import block_amax, quantize, scales_from_amax
from octavo.float8.recipe import FULL, Cast, ScaleFormat
from tests.float8 import torchao_reference as reference
from tests.float8.torchao_reference import Case, cases, relative, same_bits

UNALIGNED = 1e-6
# One ulp of float16 and bfloat16: what a float32 sum in another order can be rounded to.
ULP = {torch.float32: UNALIGNED, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def check(case: Case, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, got in mine.items():
        want = theirs[name]
        assert got.dtype == want.dtype
        if case.aligned:
            assert same_bits(got, want), f"{name}: {relative(got, want):.2e} off"
        else:
            finite = want.isfinite()
            assert torch.equal(finite, got.isfinite())
            assert relative(got[finite], want[finite]) <= ULP[case.dtype], name


@pytest.mark.parametrize("recipe", reference.RECIPES)
@settings(max_examples=340)
@given(case=cases(large=False))
def test_small_layers_equal_torchao(recipe: str, case: Case) -> None:
    check(case, reference.ours(case, recipe), reference.torchaos(case, recipe))


@pytest.mark.parametrize("recipe", reference.RECIPES)
@settings(max_examples=180)
@given(case=cases(large=True))
def test_large_layers_equal_torchao(recipe: str, case: Case) -> None:
    assert min(case.M, case.K, case.N) >= 128
    check(case, reference.ours(case, recipe), reference.torchaos(case, recipe))


@pytest.mark.parametrize("recipe", reference.RECIPES)
@settings(max_examples=100)
@given(case=cases(large=False))
def test_emulation_equals_the_native_path_on_a_cpu(recipe: str, case: Case) -> None:
    native, emulated = (reference.ours(case, recipe, emulate) for emulate in (False, True))
    for name in native:
        assert same_bits(native[name], emulated[name]), name


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    case = draw(cases(large=False))
    x = case.tensors()[0].reshape(-1, case.K)
    if draw(st.booleans()) and x.dtype != torch.float16:
        # Maxima next to a power of two, where rounding a scale down to one is delicate.
        x = x / x.abs().amax().clamp(min=1e-30) * 448 * 2.0 ** draw(st.integers(-20, 20))
        x = x.float() * (1 + draw(st.integers(-3, 3)) * 2.0**-23)
    return x


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@settings(max_examples=130)
@given(x=tensors())
def test_casts_equal_torchao(dtype: torch.dtype, rowwise: bool, pow2: bool, x: Tensor) -> None:
    scale_format = ScaleFormat.POW2 if pow2 else ScaleFormat.FP32
    cast = Cast(dtype, (1, FULL) if rowwise else (FULL, FULL), scale_format)
    data, s = reference.torchao_cast(x, dtype, rowwise=rowwise, pow2=pow2)
    got = quantize(x, cast)
    multiplier, scale = scales_from_amax(block_amax(x, cast.block), cast)
    assert torch.equal(scale, got.scale)
    want = s.reshape(multiplier.shape)
    if pow2:
        # Just below a power of two torchao's float32 log2 gives the next integer: those scales are the
        # exception.
        exact, _ = scales_from_amax(block_amax(x, cast.block), Cast(dtype, cast.block))
        misrounded = want > exact
        assert bool((exact >= want * (1 - 2.0**-20))[misrounded].all())
        assert torch.equal(multiplier[misrounded], want[misrounded] / 2)
        keep = ~misrounded if rowwise else torch.full((len(x), 1), not misrounded.item())
        multiplier, want = multiplier[~misrounded], want[~misrounded]
        assert same_bits(got.data[keep[:, 0]], data[keep[:, 0]])
    else:
        assert same_bits(got.data, data)
    assert same_bits(multiplier, want)
    assert same_bits(1 / want, 1 / multiplier)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("pow2", [False, True])
def test_what_is_not_finite_is_cast_as_torchao_casts_it(value: float, rowwise: bool, pow2: bool) -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x[2, 3] = value
    scale_format = ScaleFormat.POW2 if pow2 else ScaleFormat.FP32
    cast = Cast(torch.float8_e4m3fn, (1, FULL) if rowwise else (FULL, FULL), scale_format)
    data, s = reference.torchao_cast(x, cast.dtype, rowwise=rowwise, pow2=pow2)
    got = quantize(x, cast)
    assert same_bits(got.data, data)
    multiplier, _ = scales_from_amax(block_amax(x, cast.block), cast)
    assert same_bits(multiplier, s.reshape(multiplier.shape))
    assert got.data[2, 3].float().isnan()
