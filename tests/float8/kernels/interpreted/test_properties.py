"""Laws of the kernels on random cases."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.float8.recipe import ScaleFormat
from tests.float8.kernels import against_reference as check

shapes = st.tuples(st.integers(1, 70), st.integers(1, 140))


@settings(max_examples=60)
@given(
    kernel=st.sampled_from(list(check.KERNELS.values())),
    shape=shapes,
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


@settings(max_examples=20)
@given(
    shape=shapes,
    dtype=st.sampled_from(check.FLOAT8),
    feature=st.sampled_from(check.FEATURES),
    seed=st.integers(0, 2**16),
)
def test_transposing_float8_gives_the_references_bits(
    shape: tuple[int, int], dtype: torch.dtype, feature: str, seed: int
) -> None:
    check.check_transpose(check.make_x(shape, torch.bfloat16, feature, seed), dtype)


@settings(max_examples=20)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_transposing_float8_loses_nothing_between_normal_numbers(shape: tuple[int, int], seed: int) -> None:
    """Within six powers of two of the largest, nothing is subnormal in either cast: it rounds once."""
    g = torch.Generator().manual_seed(seed)
    x = (1 + torch.rand(shape, generator=g) * 7).to(torch.bfloat16)
    data, scale, maxima = check.cast_rows_columns.cast_rows(x, check.E4M3, "pow2", True)
    twice, _ = check.transpose_rows.transpose_rows(data, scale, maxima)
    once, _ = check.cast_rows_columns.cast_columns(x, maxima, check.E4M3, "pow2")
    check.assert_same(twice, once, "data_t")
