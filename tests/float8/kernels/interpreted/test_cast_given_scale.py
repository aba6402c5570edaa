"""Casts with a known scale: the reference's bits, this tensor's maximum, and saturated elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.float8.kernels import cast_given_scale as kernels
from octavo.float8.quantize import quantize_with_amax
from octavo.float8.recipe import FULL, Cast, ScaleFormat
from tests.float8.kernels import against_reference as check


def check_it(
    x: Tensor,
    amax: float,
    dtype: torch.dtype = check.E4M3,
    scales: ScaleFormat = ScaleFormat.FP32,
    rows: bool = True,
    columns: bool = True,
) -> None:
    given = torch.full((1, 1), amax)
    want = quantize_with_amax(x, given, Cast(dtype, (FULL, FULL), scales))
    data, data_t, scale, maxima, saturated = kernels.cast_given_scale(
        x, given, dtype, scales.value, rows, columns
    )
    if rows:
        check.assert_same(data, want.data, "data")
    if columns:
        check.assert_same(data_t, want.data.t(), "data_t")
    check.assert_same(scale, want.scale, "scale")
    check.assert_same(maxima.max().view(torch.float32), x.float().abs().max(), "maximum")
    assert int(saturated.sum()) == int(((x.float().abs() > amax) & x.isfinite()).sum())


@pytest.mark.parametrize("shape", check.SHAPES, ids=str)
@pytest.mark.parametrize("amax", [1.5, 1e-3, 1e30])
def test_shapes(shape: tuple[int, int], amax: float) -> None:
    check_it(check.make_x(shape, torch.bfloat16, "spread"), amax)


@pytest.mark.parametrize("scales", [ScaleFormat.FP32, ScaleFormat.POW2], ids=lambda scales: scales.value)
@pytest.mark.parametrize("dtype", check.FLOAT8)
def test_formats(dtype: torch.dtype, scales: ScaleFormat) -> None:
    for source in check.DTYPES:
        check_it(check.make_x((37, 140), source, "spread"), 3.0, dtype, scales)


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True)])
def test_one_of_two(rows: bool, columns: bool) -> None:
    check_it(check.make_x((70, 140), torch.bfloat16, "spread"), 3.0, rows=rows, columns=columns)


def test_what_is_not_finite_is_nan_and_never_the_largest_number() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1.0]])
    for dtype in check.FLOAT8:
        data, _, scale, _, saturated = kernels.cast_given_scale(
            x, torch.ones(1, 1), dtype, "fp32", True, False
        )
        values = data.float() * scale
        assert values[0, :3].isnan().all()
        torch.testing.assert_close(values[0, 3:], torch.tensor([1.0, -1.0, 1.0]))
        assert int(saturated.sum()) == 2


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_configurations(config: dict) -> None:
    with check.only(kernels, "_cast_given_scale", config):
        for shape, feature in (((130, 200), "spread"), ((128, 256), "nan")):
            check_it(check.make_x(shape, torch.bfloat16, feature), 2.0)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    source=st.sampled_from(check.DTYPES),
    dtype=st.sampled_from(check.FLOAT8),
    feature=st.sampled_from(check.FEATURES),
    amax=st.floats(2.0**-66, 2.0**66, width=32),
    seed=st.integers(0, 2**16),
)
def test_any_tensor(
    shape: tuple[int, int], source: torch.dtype, dtype: torch.dtype, feature: str, amax: float, seed: int
) -> None:
    check_it(check.make_x(shape, source, feature, seed), amax, dtype)
