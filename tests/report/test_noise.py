"""The statistics of a comparison against hand-computed cases, and against numbers drawn from a known law."""

import math
import random

import pytest

from octavo.report import noise


def test_smoothing_is_the_mean_of_the_last_window() -> None:
    assert noise.smooth({1: 1.0, 2: 2.0, 3: 6.0, 5: 4.0}, 2) == {2: 1.5, 3: 4.0, 5: 5.0}
    assert noise.smooth({1: 1.0, 2: math.nan, 3: 3.0}, 2) == {3: 2.0}
    assert noise.smooth({1: 1.0}, 2) == {}


def test_a_gap_is_taken_where_both_report() -> None:
    assert noise.gap({1: 3.0, 2: 5.0, 4: 7.0}, {2: 4.0, 3: 0.0, 4: 4.0}, 2) == {4: 2.0}


def test_the_band_is_two_deviations_of_the_difference_of_two_seeds() -> None:
    steps = range(1, 41)
    seeds = [dict.fromkeys(steps, 1.0), dict.fromkeys(steps, 3.0)]  # variance 2, of a difference 4
    band = noise.noise_band(seeds, 2)
    assert list(band) == list(range(2, 41))
    assert all(width == pytest.approx(4.0) for width in band.values())
    assert noise.noise_band(seeds[:1], 2) == {}


def test_the_band_follows_the_phase_of_the_run() -> None:
    early = {step: 1.0 if step <= 100 else 0.0 for step in range(1, 201)}
    band = noise.noise_band([early, dict.fromkeys(range(1, 201), 0.0)], 1)
    assert band[50] == pytest.approx(2.0)
    assert band[150] == 0


def test_most_seeds_of_one_law_lie_mostly_within_each_others_band() -> None:
    draw = random.Random(0)

    def seed() -> dict[int, float]:
        offset = draw.gauss(0, 1)
        return {step: offset + draw.gauss(0, 0.1) for step in range(1, 101)}

    within = 0
    for _ in range(200):
        *known, other = (seed() for _ in range(4))
        band = noise.noise_band(known, 5)
        gaps = noise.gap(other, known[0], 5)
        within += sum(abs(gaps[step]) <= band[step] for step in gaps) / len(gaps)
    # Two deviations hold 95% where the deviation is known; three seeds with lasting offsets know it badly.
    assert 0.75 < within / 200 < 0.95


def test_where_a_gap_is_widest() -> None:
    found = noise.widest({1: 0.1, 2: -0.6, 3: 0.5}, {2: 0.5, 3: 1.0})
    assert found == noise.Widest(step=2, gap=-0.6, band=0.5, share=1.2)
    assert not found.inside
    assert noise.widest({1: 0.1}, {2: 1.0}) is None
    nothing = noise.widest({1: 0.0}, {1: 0.0})
    assert nothing is not None
    assert nothing.inside


def test_the_mean_difference_and_its_interval() -> None:
    base = {step: math.sin(step) for step in range(1, 321)}
    draw = random.Random(1)
    other = {step: loss + 0.02 + draw.gauss(0, 0.01) for step, loss in base.items()}
    found = noise.mean_difference(other, base)
    assert found is not None
    assert found.mean == pytest.approx(0.02, abs=3 * 0.01 / math.sqrt(160))
    # 2.365 times the deviation of eight means of twenty, over the root of eight
    assert found.half_width == pytest.approx(2.365 * 0.01 / math.sqrt(160), rel=0.5)
    assert found.beside_zero
    assert noise.mean_difference({1: 1.0}, {1: 1.0}) is None


def test_slope_and_first_step_below() -> None:
    assert noise.slope({step: 5 - 0.25 * step for step in range(1, 11)}) == pytest.approx(-0.25)
    assert noise.slope({1: 1.0}) == 0
    assert noise.first_below({1: 3.0, 2: 2.0, 3: 2.5}, 2.0) == 2
    assert noise.first_below({1: 3.0}, 2.0) is None
