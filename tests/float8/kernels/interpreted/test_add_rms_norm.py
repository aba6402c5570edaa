"""Residual and RMSNorm: values beside float64 and autograd, maxima and casts those of the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8.kernels import add_rms_norm as kernels
from tests.float8.kernels import against_reference as check

EPS = 1e-5
SHAPES = [(37, 130), (1, 1), (32, 256), (17, 65)]


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, residual, dy, dh and w."""
    wide = [check.make_x(shape, torch.float32, "spread", seed).to(dtype) for seed in range(4)]
    return [*wide, (1 + 0.1 * check.make_x((1, shape[1]), torch.float32)[0]).to(dtype)]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_values(x: Tensor, residual: Tensor, dy: Tensor, dh: Tensor, w: Tensor) -> None:
    """Values of float32 inputs, beside autograd's in float64."""
    h, rms, (y, _, _) = kernels.add_rms_norm(x, residual, w, EPS)
    (dx, _, _), dw = kernels.add_rms_norm_backward(dy, dh, h, rms, w)
    assert torch.equal(h, x + residual)
    exact = h.double().requires_grad_()
    exact_w = w.double().requires_grad_()
    want = exact * (exact.square().mean(dim=1, keepdim=True) + EPS).rsqrt() * exact_w
    want.backward(dy.double())
    assert exact.grad is not None
    assert exact_w.grad is not None
    torch.testing.assert_close(y.double(), want.detach(), rtol=1e-6, atol=0)
    assert relative(dx, exact.grad + dh) < 1e-6
    assert relative(dw, exact_w.grad) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_in_float32(shape: tuple[int, int]) -> None:
    check_values(*inputs(shape, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_the_references_but_for_rounding(dtype: torch.dtype) -> None:
    x, residual, dy, dh, w = inputs((37, 130), dtype)
    h, rms, (y, _, _) = kernels.add_rms_norm(x, residual, w, EPS)
    (dx, _, _), dw = kernels.add_rms_norm_backward(dy, dh, h, rms, w)
    want_h, want_rms, want_y = kernels.reference(x, residual, w, EPS)
    want_dx, want_dw = kernels.reference_backward(dy, dh, h, rms, w)
    assert torch.equal(h, want_h)
    torch.testing.assert_close(rms, want_rms, rtol=1e-6, atol=0)
    torch.testing.assert_close(dw, want_dw, rtol=1e-5, atol=1e-4)
    for got, want in ((y, want_y), (dx, want_dx)):
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
        assert (got != want).float().mean() < 0.01


@pytest.mark.parametrize(("shape", "dtype"), check.pairs(SHAPES), ids=str)
def test_casts_are_those_of_the_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, dy, dh, w = inputs(shape, dtype)
    h, rms, y = kernels.add_rms_norm(x, residual, w, EPS)
    check.check_given_maxima(*y)
    check.check_given_maxima(*kernels.add_rms_norm_backward(dy, dh, h, rms, w)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 1e-40, 3e38])
def test_hard_values_reach_the_maxima(value: float) -> None:
    x, residual, dy, dh, w = inputs((20, 70), torch.bfloat16)
    x[3, 5] = value
    x[7], residual[7] = value, 0.0
    dy[9] = value
    h, rms, y = kernels.add_rms_norm(x, residual, w, EPS)
    assert y[0][4].isfinite().all()
    dx, _ = kernels.add_rms_norm_backward(dy, dh, h, rms, w)
    want = kernels.reference(x, residual, w, EPS)[2]
    want_dx, _ = kernels.reference_backward(dy, dh, h, rms, w)
    for got, wanted in ((y, want), (dx, want_dx)):
        assert torch.equal(got[0].isnan(), wanted.isnan())
        check.check_given_maxima(*got)


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 140)),
    dtype=st.sampled_from(check.DTYPES),
    feature=st.sampled_from(check.FEATURES),
    seed=st.integers(0, 2**16),
)
def test_any_tensor(shape: tuple[int, int], dtype: torch.dtype, feature: str, seed: int) -> None:
    """Maxima and casts are those of the values, and what is not a number is none in the reference either."""
    x, residual, dy, dh = (check.make_x(shape, dtype, feature, seed + i) for i in range(4))
    w = check.make_x((1, shape[1]), dtype, seed=seed)[0]
    h, rms, y = kernels.add_rms_norm(x, residual, w, EPS)
    dx, _ = kernels.add_rms_norm_backward(dy, dh, h, rms, w)
    assert torch.equal(y[0].isnan(), kernels.reference(x, residual, w, EPS)[2].isnan())
    check.check_given_maxima(*y)
    check.check_maxima(*dx)
    if feature == "plain" and dtype == torch.float32:
        check_values(x, residual, dy, dh, w)


@pytest.mark.parametrize("config", kernels.CONFIGS_FORWARD, ids=str)
def test_configurations_forward(config: dict) -> None:
    with check.only(kernels, "_forward", config):
        check_values(*inputs((37, 1000), torch.float32))
        x, residual, _, _, w = inputs((37, 300), torch.bfloat16)
        check.check_maxima(*kernels.add_rms_norm(x, residual, w, EPS)[2])


@pytest.mark.parametrize("config", kernels.CONFIGS_BACKWARD, ids=str)
def test_configurations_backward(config: dict) -> None:
    with check.only(kernels, "_backward", config):
        check_values(*inputs((37, 1000), torch.float32))
        x, residual, dy, dh, w = inputs((37, 300), torch.bfloat16)
        h, rms, _ = kernels.reference(x, residual, w, EPS)
        check.check_maxima(*kernels.add_rms_norm_backward(dy, dh, h, rms, w)[0])


def test_rows_too_long_for_a_chip_are_refused() -> None:
    x = torch.zeros(1, kernels.WIDEST + 1)
    with pytest.raises(ValueError, match=r"rows of 8193 .* at most 8192"):
        kernels.add_rms_norm(x, x, x[0], EPS)
