"""The arithmetic of `kernels/numerics.py` equals the reference, value by value."""

from __future__ import annotations

import pytest
import torch

from octavo.float8.recipe import ScaleFormat
from tests.float8.kernels import against_reference as check


@pytest.mark.parametrize("dtype", check.FLOAT8)
def test_every_bfloat16_value_converts_as_the_reference_does(dtype: torch.dtype) -> None:
    check.check_conversion(check.every_bfloat16("cpu"), dtype)


@pytest.mark.parametrize("dtype", check.FLOAT8)
def test_float32_converts_as_the_reference_does(dtype: torch.dtype) -> None:
    check.check_conversion(check.float32_points("cpu", 200_000), dtype)


def test_every_value_of_two_bytes_widens() -> None:
    check.check_widening("cpu")


@pytest.mark.parametrize("scales", ScaleFormat)
@pytest.mark.parametrize("dtype", check.FLOAT8)
def test_scales_are_the_references(dtype: torch.dtype, scales: ScaleFormat) -> None:
    least = torch.tensor([1e-12, 9.9e-13, 1.1e-12, 0.0, torch.inf, torch.nan])
    amax = torch.cat([check.float32_points("cpu", 200_000, non_negative=True), least])
    check.check_scales(amax, dtype, scales)
    check.check_scales(check.every_bfloat16("cpu").float().abs(), dtype, scales)
