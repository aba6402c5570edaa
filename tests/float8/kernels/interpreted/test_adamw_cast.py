"""AdamW steps with casts: values beside torch.optim.AdamW, casts bit for bit those of the new weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8.kernels import adamw_cast as kernels
from octavo.float8.kernels.cast_tensor import cast_tensor
from octavo.float8.quantize import Quantized, quantize
from octavo.float8.recipe import FULL, Cast
from tests.float8.kernels import against_reference as check

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEP = kernels.Step.of(3, **HYPER)
SHAPES = [(1, 1), (37, 130), (128, 256), (130, 200)]
CASTS = ("maxima", "squares")


def inputs(
    shape: tuple[int, int], moments: torch.dtype = torch.float32, feature: str = "spread", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, g, m, v = (check.make_x(shape, torch.float32, "plain", seed + i) for i in range(4))
    g = check.make_x(shape, torch.float32, feature, seed)
    return w, g, m.to(moments), v.square().to(moments)


def step(
    cast: str, tensors: tuple[Tensor, ...], source: torch.dtype | None = None, numbers: kernels.Step = STEP
) -> None:
    """Step `tensors` in place, and compare what came of it with casting the new weight."""
    w, g, m, v = tensors
    if cast == "maxima":
        _, rows, columns = kernels.adamw_maxima(w, g, m, v, numbers, source)
        new = w if source is None else w.to(source)
        check.check_maxima(new, rows, columns)
        whole = Cast(check.E4M3, (FULL, FULL))
        data, _, scale = cast_tensor(new, rows.flatten(), check.E4M3, "fp32", True, False)
        want = quantize(new, whole)
        got = Quantized(data, scale)
    else:
        data, data_t, scale = kernels.adamw_squares(w, g, m, v, numbers, 128, check.E4M3, "fp32", source)
        new = w if source is None else w.to(source)
        want = quantize(new, Cast(check.E4M3, (128, 128)))
        check.assert_same(data_t, want.data.t(), "data_t")
        got = Quantized(data, scale)
    assert isinstance(want, Quantized)
    check.assert_same(got.data, want.data, "data")
    check.assert_same(got.scale, want.scale, "scale")


def check_values(cast: str, shape: tuple[int, int], seed: int = 0) -> None:
    """float32: within 2 ulp an operation of the same formula in float64, and of PyTorch's in float32."""
    before = inputs(shape, seed=seed)
    after = tuple(t.clone() for t in before)
    step(cast, after)
    w, g, m, v = (t.double() for t in before)
    want_m = m + (g - m) * (1 - STEP.beta1)
    want_v = v * STEP.beta2 + g * g * (1 - STEP.beta2)
    change = STEP.rate * want_m / (want_v.sqrt() / STEP.root + STEP.eps)
    ulp = 2.0**-23
    assert float(((after[2] - want_m).abs() - 6 * ulp * (m.abs() + g.abs())).max()) <= 0
    assert float(((after[3] - want_v).abs() - 8 * ulp * want_v).max()) <= 0
    size = w.abs() + STEP.rate * (m.abs() + g.abs()) / (want_v.sqrt() / STEP.root + STEP.eps)
    assert float(((after[0] - (w * STEP.decay - change)).abs() - 20 * ulp * size).max()) <= 0
    for got, wanted in zip((after[0], *after[2:]), kernels.reference(*before, STEP), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_casts(cast: str, shape: tuple[int, int]) -> None:
    check_values(cast, shape)


def test_the_reference_is_pytorchs_adamw() -> None:
    w, g, m, v = inputs((37, 70))
    p = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([p], foreach=False, **HYPER)
    optimizer.state[p] = {"step": torch.tensor(2.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    p.grad = g
    optimizer.step()
    state = optimizer.state[p]
    for got, want in zip(
        kernels.reference(w, g, m, v, STEP), (p.data, state["exp_avg"], state["exp_avg_sq"]), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", CASTS)
def test_moments_of_two_bytes_and_weights_rounded_first(cast: str, source: torch.dtype) -> None:
    before = inputs((37, 130), torch.bfloat16)
    after = tuple(t.clone() for t in before)
    step(cast, after, source)
    for got, want in zip((after[0], *after[2:]), kernels.reference(*before, STEP), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(got.dtype).eps, atol=2e-6)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
@pytest.mark.parametrize("cast", CASTS)
def test_configurations(cast: str, config: dict) -> None:
    name = f"_adamw_{cast}"
    with check.only(kernels, name, config):
        check_values(cast, (130, 200))
        check_values(cast, (64, 128))


@settings(max_examples=20)
@given(
    cast=st.sampled_from(CASTS),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    feature=st.sampled_from(check.FEATURES),
    t=st.integers(1, 100_000),
    seed=st.integers(0, 2**16),
)
def test_any_gradient(cast: str, shape: tuple[int, int], feature: str, t: int, seed: int) -> None:
    """Casts are those of the new weights; a gradient that is no number makes weights that are none."""
    numbers = kernels.Step.of(t, **HYPER)
    before = inputs(shape, feature=feature, seed=seed)
    after = tuple(x.clone() for x in before)
    step(cast, after, numbers=numbers)
    wanted = kernels.reference(*before, numbers)
    for got, want in zip((after[0], *after[2:]), wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
