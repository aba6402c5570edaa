"""`permute` is a permutation, different for each seed and epoch, and never changes."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data.shuffle import mix64, permute, permute_many, permute_range


def order(size, seed=0, epoch=0):
    return [permute(index, size, seed=seed, epoch=epoch) for index in range(size)]


@given(st.integers(1, 400), st.integers(-(2**63), 2**64), st.integers(0, 2**40))
def test_is_a_permutation(size, seed, epoch):
    assert sorted(order(size, seed, epoch)) == list(range(size))


@given(st.integers(1, 3000), st.integers(-(2**63), 2**64), st.integers(0, 2**40))
def test_many_at_once_are_the_same(size, seed, epoch):
    start, stop = size // 3, min(size, size // 3 + 50)
    one_by_one = [permute(index, size, seed=seed, epoch=epoch) for index in range(start, stop)]
    assert permute_range(start, stop, size, seed=seed, epoch=epoch).tolist() == one_by_one


def test_many_of_a_huge_corpus():
    found = permute_many(np.array([10**12, 0, 10**13 - 1]), 10**13, seed=1, epoch=2).tolist()
    assert found == [permute(index, 10**13, seed=1, epoch=2) for index in (10**12, 0, 10**13 - 1)]


def test_recorded_values():
    """A change here makes every checkpoint resume on other text."""
    assert mix64(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 seeded with 0
    assert order(10, seed=42) == [7, 9, 5, 2, 6, 8, 1, 3, 0, 4]
    assert permute(10**12, 10**13, seed=1, epoch=2) == 3_644_032_293_493


def test_seed_and_epoch_give_other_orders():
    orders = [tuple(order(50, seed, epoch)) for seed in range(8) for epoch in range(8)]
    assert len(set(orders)) == len(orders)


def test_mixes():
    """Neighbours are far apart and all positions equally likely, by 2,000 draws."""
    size, draws = 16, 2000
    counts = [0] * size
    for seed in range(draws):
        counts[permute(3, size, seed=seed, epoch=0)] += 1
    expected = draws / size
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001
    big = order(4096, seed=5)
    steps = sum(abs(a - b) for a, b in pairwise(big)) / 4095
    assert math.isclose(steps, 4096 / 3, rel_tol=0.05)  # mean distance of two random positions


@pytest.mark.parametrize("index", [-1, 5])
def test_refuses_what_is_outside(index):
    with pytest.raises(ValueError, match=r"range\(5\)"):
        permute(index, 5, seed=0, epoch=0)
