"""silu(a) * b: values within an ulp or two of float64's, maxima and casts bit for bit those of the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8.kernels import silu_mul as kernels
from octavo.float8.kernels.cast_given_maxima import CONFIGS as CAST_CONFIGS
from octavo.float8.kernels.silu_mul import CONFIGS
from tests.float8.kernels import against_reference as check

SHAPES = [(37, 130), (1, 1), (64, 256), (33, 257)]


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a reaches from where silu is flat to where it is the identity."""
    a, b, dh = (check.make_x(shape, torch.float32, "spread", seed) for seed in (1, 2, 3))
    return (a.clamp(-30, 30)).to(dtype), b.to(dtype), dh.to(dtype)


def ulps(got: Tensor, want: Tensor) -> float:
    """How far float32 `got` is from float64 `want`, in units in the last place of float32."""
    near = want.float()
    spacing = (near.abs().nextafter(torch.tensor(torch.inf)) - near.abs()).double()
    return float(((got.double() - want).abs() / spacing).max())


def check_values(a: Tensor, b: Tensor, dh: Tensor) -> None:
    """Values of float32 inputs, beside those in float64."""
    exact = [t.double() for t in (a, b, dh)]
    h, _, _ = kernels.silu_mul(a, b)
    # Four operations (exp, +, /, *), each within 2 ulp.
    assert ulps(h, torch.nn.functional.silu(exact[0]) * exact[1]) <= 8
    (da, _, _), (db, _, _) = kernels.silu_mul_backward(dh, a, b)
    sigmoid = exact[0].sigmoid()
    assert ulps(db, exact[2] * exact[0] * sigmoid) <= 10
    # 1 + a (1 - sigmoid) passes through zero, so errors count against the terms of that sum.
    slope = sigmoid * (1 + exact[0] * (1 - sigmoid))
    size = sigmoid * (1 + exact[0].abs() * (1 - sigmoid) + exact[0].abs())
    error = (da.double() - exact[2] * exact[1] * slope).abs() / (exact[2] * exact[1] * size).abs()
    assert float(error.nan_to_num().max()) < 10 * 2**-23


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_in_float32(shape: tuple[int, int]) -> None:
    check_values(*inputs(shape, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_the_references_but_for_rounding(dtype: torch.dtype) -> None:
    a, b, dh = inputs((40, 140), dtype)
    got = [kernels.silu_mul(a, b)[0], *(made[0] for made in kernels.silu_mul_backward(dh, a, b))]
    want = [kernels.reference(a, b), *kernels.reference_backward(dh, a, b)]
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        # A value on the edge of a rounding goes either way, no other does.
        assert (one != other).float().mean() < 0.01


@pytest.mark.parametrize(("shape", "dtype"), check.pairs(SHAPES), ids=str)
def test_casts_are_those_of_the_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b, dh = inputs(shape, dtype)
    for made in (kernels.silu_mul(a, b), *kernels.silu_mul_backward(dh, a, b)):
        check.check_given_maxima(*made)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 3e38])
def test_hard_values_reach_the_maxima(value: float) -> None:
    a, b, dh = inputs((40, 140), torch.bfloat16)
    a[3, 5], b[7, 9], dh[1, 2] = value, value, value
    a[4, 6] = b[4, 6] = dh[4, 6] = value
    made = (kernels.silu_mul(a, b), *kernels.silu_mul_backward(dh, a, b))
    want = (kernels.reference(a, b), *kernels.reference_backward(dh, a, b))
    check.check_given_maxima(*made[0])
    for one, other in zip(made, want, strict=True):
        check.check_maxima(*one)
        torch.testing.assert_close(one[0], other, rtol=2**-7, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations(config: dict) -> None:
    with check.only(kernels, "_forward", config), check.only(kernels, "_backward", config):
        check_values(*inputs((40, 140), torch.float32))
        a, b, dh = inputs((40, 140), torch.bfloat16)
        for made in (kernels.silu_mul(a, b), *kernels.silu_mul_backward(dh, a, b)):
            check.check_maxima(*made)


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    dtype=st.sampled_from(check.DTYPES),
    feature=st.sampled_from(check.FEATURES),
    seed=st.integers(0, 2**16),
)
def test_any_tensor(shape: tuple[int, int], dtype: torch.dtype, feature: str, seed: int) -> None:
    """Maxima and casts are those of the values, and what is not a number is none in the reference either."""
    a, b, dh = (check.make_x(shape, dtype, feature, seed + i) for i in range(3))
    made = (kernels.silu_mul(a, b), *kernels.silu_mul_backward(dh, a, b))
    want = (kernels.reference(a, b), *kernels.reference_backward(dh, a, b))
    for one, other in zip(made, want, strict=True):
        assert torch.equal(one[0].isnan(), other.isnan())
        check.check_maxima(*one)
    check.check_given_maxima(*made[seed % 3])
    if feature in ("plain", "spread") and dtype == torch.float32:
        check_values(a.clamp(-30, 30), b, dh)


@pytest.mark.parametrize("config", CAST_CONFIGS, ids=str)
@pytest.mark.parametrize(("shape", "feature"), [((130, 140), "spread"), ((128, 128), "nan")])
def test_configurations_of_the_cast(config: dict, shape: tuple[int, int], feature: str) -> None:
    x = check.make_x(shape, torch.bfloat16, feature)
    maxima = [x.float().abs().amax(dim)[None].view(torch.int32) for dim in (1, 0)]
    with check.only(check.cast_given_maxima, "_cast_given_maxima", config):
        check.check_given_maxima(x, *maxima)
