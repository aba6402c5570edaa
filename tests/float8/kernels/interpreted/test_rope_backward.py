"""Gradients of rotated heads, rotated back: beside autograd of the model's own rotation, and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8.kernels import rope_backward as kernels
from tests.float8.kernels import against_reference as check

SHAPES = [(2, 16, 4, 32), (1, 1, 1, 2), (1, 37, 3, 6), (3, 11, 5, 128), (1, 33, 2, 100)]  # B, S, H, E


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, feature: str = "spread", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, head by head as attention gives it, and cos and sin of more positions than it has."""
    B, S, H, E = shape
    dy = check.make_x((B * H * S, E), dtype, feature, seed).view(B, H, S, E).transpose(1, 2)
    frequencies = 500_000.0 ** -(torch.arange(0, E, 2) / E)
    angles = torch.outer(torch.arange(S + 3.0), frequencies)
    return dy, angles.cos(), angles.sin()


def check_values(dy: Tensor, cos: Tensor, sin: Tensor) -> None:
    """float32: two products and a sum, so 2 ulp of the larger product for each."""
    got = kernels.rope_backward(dy, cos, sin)[0].view(*dy.shape).double()
    even, odd = dy.double().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = (t[: dy.shape[1], None].double() for t in (cos, sin))
    want = torch.stack((even * c + odd * s, odd * c - even * s), -1).flatten(-2)
    size = torch.stack(((even * c).abs() + (odd * s).abs(), (odd * c).abs() + (even * s).abs()), -1)
    error = (got - want).abs() - 6 * 2**-24 * size.flatten(-2)
    assert float(error.max()) <= 1e-44


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_in_float32(shape: tuple[int, ...]) -> None:
    check_values(*inputs(shape, torch.float32))


@pytest.mark.parametrize(("shape", "dtype"), check.pairs(SHAPES), ids=str)
def test_it_is_the_references_value_and_its_casts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    dy, cos, sin = inputs(shape, dtype)
    made = kernels.rope_backward(dy, cos, sin)
    check.assert_same(made[0], kernels.reference(dy, cos, sin), "dx")
    check.check_given_maxima(*made)


def test_it_is_the_gradient_of_rotating() -> None:
    dy, cos, sin = inputs((2, 9, 3, 16), torch.float32)
    x = torch.zeros_like(dy).requires_grad_()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:9, None], sin[:9, None]
    torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2).backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(kernels.rope_backward(dy, cos, sin)[0].view_as(x), x.grad)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_configurations(config: dict) -> None:
    with check.only(kernels, "_rope_backward", config):
        check_values(*inputs((2, 40, 3, 48), torch.float32))
        for shape in ((2, 16, 4, 32), (1, 37, 3, 6)):
            dy, cos, sin = inputs(shape, torch.bfloat16)
            made = kernels.rope_backward(dy, cos, sin)
            check.assert_same(made[0], kernels.reference(dy, cos, sin), "dx")
            check.check_maxima(*made)


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 20)),
    dtype=st.sampled_from(check.DTYPES),
    feature=st.sampled_from(check.FEATURES),
    seed=st.integers(0, 2**16),
)
def test_any_tensor(shape: tuple[int, ...], dtype: torch.dtype, feature: str, seed: int) -> None:
    dy, cos, sin = inputs((*shape[:3], 2 * shape[3]), dtype, feature, seed)
    made = kernels.rope_backward(dy, cos, sin)
    check.assert_same(made[0], kernels.reference(dy, cos, sin), "dx")
    check.check_given_maxima(*made)


def test_tables_that_do_not_fit_are_refused() -> None:
    dy, cos, sin = inputs((1, 5, 1, 4), torch.float32)
    with pytest.raises(ValueError, match="heads of 4 over 5 positions"):
        kernels.rope_backward(dy, cos[:4], sin[:4])
    with pytest.raises(ValueError, match="an even width"):
        kernels.rope_backward(dy[..., :3], cos, sin)
