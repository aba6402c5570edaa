"""Each kernel against its reference, bit for bit: shapes, formats, dtypes, hard values."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.float8.recipe import ScaleFormat
from tests.float8.kernels import against_reference as check

KERNELS = list(check.KERNELS.values())


@pytest.mark.parametrize("shape", check.SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_shapes(kernel: check.Kernel, shape: tuple[int, int]) -> None:
    check.check_cast(kernel, check.make_x(shape, torch.bfloat16, "spread"), check.E4M3, ScaleFormat.POW2)


@pytest.mark.parametrize("scales", ScaleFormat, ids=lambda scales: scales.value)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_formats(kernel: check.Kernel, scales: ScaleFormat) -> None:
    for dtype, sources in ((check.E4M3, check.DTYPES), (check.E5M2, check.DTYPES[:1])):
        for source in sources:
            check.check_cast(kernel, check.make_x((37, 140), source, "spread"), dtype, scales)


@pytest.mark.parametrize("feature", check.FEATURES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_hard_values(kernel: check.Kernel, feature: str) -> None:
    for source, scales in (
        (torch.bfloat16, ScaleFormat.FP32),
        (torch.float16, ScaleFormat.E8M0),
        (torch.float32, ScaleFormat.FP32),
        (torch.float32, ScaleFormat.E8M0),
    ):
        check.check_cast(kernel, check.make_x((40, 70), source, feature), check.E4M3, scales)


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_one_of_two(kernel: check.Kernel, rows: bool, columns: bool) -> None:
    x = check.make_x((130, 70), torch.bfloat16, "spread")
    check.check_cast(kernel, x, check.E4M3, ScaleFormat.FP32, rows, columns)


def test_long_strips() -> None:
    """Programs of the first pass process 32 rows, a few at a time; the last program has fewer."""
    assert check.cast_rows_columns.strip_of(4096, 5) == 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check.cast_rows_columns, "strip_of", lambda M, K: 32)
        x = check.make_x((100, 300), torch.bfloat16, "spread")
        check.check_cast(check.KERNELS["rows"], x, check.E4M3, ScaleFormat.POW2)


def test_more_elements_than_programs_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass of the tensorwise cast loops over x and misses no element, at the loop's edges or the
    end.
    """
    monkeypatch.setattr(check.cast_tensor, "MAX_PROGRAMS", 3)
    block = check.cast_tensor.CONFIGS_MAGNITUDES[0]["BLOCK"]
    for at in (3 * block - 1, 3 * block, 7 * block, -1):
        x = torch.zeros(5, 10_003)
        x.view(-1)[at] = -1.0
        assert check.cast_tensor.magnitudes(x).view(torch.float32).max() == 1.0


@settings(max_examples=60)
@given(
    kernel=st.sampled_from(list(check.KERNELS.values())),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    source=st.sampled_from(check.DTYPES),
    dtype=st.sampled_from(check.FLOAT8),
    scales=st.sampled_from(list(ScaleFormat)),
    feature=st.sampled_from(check.FEATURES),
    seed=st.integers(0, 2**16),
)
def test_kernels_give_the_references_bits(
    kernel: check.Kernel,
    shape: tuple[int, int],
    source: torch.dtype,
    dtype: torch.dtype,
    scales: ScaleFormat,
    feature: str,
    seed: int,
) -> None:
    check.check_cast(kernel, check.make_x(shape, source, feature, seed), dtype, scales)


@pytest.mark.parametrize(("module", "name", "config", "user"), check.CONFIGURATIONS)
def test_bits_do_not_depend_on_the_configuration(
    module: ModuleType, name: str, config: dict, user: str
) -> None:
    check.check_configuration(module, name, config, user, "cpu")
