"""The numbers are torchao's: a user of torchao needs no new convergence study.

Casts are equal bit for bit on every processor. A product's last bits depend on the order of additions and on
when scales are applied, which differ between processors. So products are bounded by what no order changes:
each element within `ROUNDING` of the sum of its terms' magnitudes, plus one rounding of the output's dtype.
Bits are compared where both sides add alike: with power-of-two scales and sizes that are multiples of 16,
octavo without bfloat16 units and torchao's emulation call `torch.mm` in float32 with the same values.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8 import matmul
from octavo.float8.quantize import block_amax, quantize, scales_from_amax
from octavo.float8.recipe import FULL, Cast, ScaleFormat
from tests.float8 import torchao_reference as reference
from tests.float8.torchao_reference import Case, cases, relative, same_bits

ROUNDING = 1e-6
# The distance of neighbouring numbers, relative to them: what sums that differ a little may be rounded apart.
NEIGHBOURS = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
LEAST = {torch.float32: 1e-37, torch.float16: 2.0**-24, torch.bfloat16: 1e-37}


def magnitudes(case: Case) -> dict[str, Tensor]:
    """The sums of the magnitudes of the terms of each result's elements."""
    x, w, dy, bias = case.tensors()
    x_MK, dy_MN, w_NK = (t.double().abs().flatten(0, -2) for t in (x, dy, w))
    return {
        "output": x_MK @ w_NK.t() + (0 if bias is None else bias.double().abs()),
        "grad_input": dy_MN @ w_NK,
        "grad_weight": dy_MN.t() @ x_MK,
        "grad_bias": dy_MN.sum(0),
    }


def check(case: Case, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    terms, bias = magnitudes(case), case.tensors()[3]
    for name, got in mine.items():
        want = theirs[name]
        assert got.dtype == want.dtype == case.dtype
        finite = want.isfinite()
        assert torch.equal(finite, got.isfinite()), name
        rounded = want.double().abs()
        if name == "output" and bias is not None:  # the product is rounded, and its sum with the bias
            rounded = rounded + (want.double() - bias.double()).abs()
        limit = ROUNDING * terms[name].reshape(want.shape) + NEIGHBOURS[case.dtype] * rounded
        off = (got.double() - want.double()).abs() - limit - LEAST[case.dtype]
        assert not bool((off[finite] > 0).any()), f"{name}: {relative(got[finite], want[finite]):.2e} off"


@pytest.mark.parametrize("recipe", reference.RECIPES)
@settings(max_examples=140)
@given(case=cases(large=False))
def test_small_layers_equal_torchao(recipe: str, case: Case) -> None:
    check(case, reference.ours(case, recipe), reference.torchaos(case, recipe))


@pytest.mark.parametrize("recipe", reference.RECIPES)
@settings(max_examples=70)
@given(case=cases(large=True))
def test_large_layers_equal_torchao(recipe: str, case: Case) -> None:
    assert min(case.M, case.K, case.N) >= 128
    check(case, reference.ours(case, recipe), reference.torchaos(case, recipe))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
@settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_bits_are_torchaos_where_both_add_alike(recipe: str, large: bool, data: st.DataObject) -> None:
    case = data.draw(cases(large=large))
    assume(case.aligned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "BFLOAT16_UNITS", False)
        mine = reference.ours(case, recipe)
    theirs = reference.torchaos(case, recipe)
    for name, got in mine.items():
        assert same_bits(got, theirs[name]), f"{name}: {relative(got, theirs[name]):.2e} off"


@pytest.mark.parametrize("recipe", reference.RECIPES)
@settings(max_examples=60)
@given(case=cases(large=False))
def test_emulation_computes_what_the_native_path_of_a_cpu_does(recipe: str, case: Case) -> None:
    native, emulated = (reference.ours(case, recipe, emulate) for emulate in (False, True))
    check(case, emulated, native)


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
