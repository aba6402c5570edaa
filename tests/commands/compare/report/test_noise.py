"""The statistics of a comparison against hand-computed cases, and against numbers drawn from a known law."""

import math
import random

import pytest

from octavo.commands.compare.report import noise


def test_smoothing_is_the_mean_of_the_last_window() -> None:
    assert noise.smooth({1: 1.0, 2: 2.0, 3: 6.0, 5: 4.0}, 2) == {2: 1.5, 3: 4.0, 5: 5.0}
    assert noise.smooth({1: 1.0, 2: math.nan, 3: 3.0}, 2) == {3: 2.0}
    assert noise.smooth({1: 1.0}, 2) == {}


def test_a_gap_is_taken_where_both_report() -> None:
    assert noise.gap({1: 3.0, 2: 5.0, 4: 7.0}, {2: 4.0, 3: 0.0, 4: 4.0}, 2) == {4: 2.0}


@pytest.mark.parametrize(
    ("offsets", "width"),
    [
        ((1.0, 3.0), 12.706 * 2),  # variance 2, of a difference 4
        ((1.0, 2.0, 3.0), 4.303 * math.sqrt(2)),
        ((0.0, 0.0, 3.0, 3.0), 3.182 * math.sqrt(6)),
    ],
)
def test_the_band_holds_the_difference_of_two_seeds(offsets: tuple[float, ...], width: float) -> None:
    steps = range(1, 41)
    seeds = [dict.fromkeys(steps, offset) for offset in offsets]
    band = noise.noise_band(seeds, 2)
    assert list(band) == list(range(2, 41))
    assert all(found == pytest.approx(width) for found in band.values())
    assert noise.noise_band(seeds[:1], 2) == {}


def test_the_band_follows_the_phase_of_the_run() -> None:
    early = {step: 1.0 if step <= 100 else 0.0 for step in range(1, 201)}
    band = noise.noise_band([early, dict.fromkeys(range(1, 201), 0.0)], 1)
    assert band[50] == pytest.approx(12.706)
    assert band[150] == 0


def test_estimated_deviations_are_those_of_a_table() -> None:
    # The quantiles of Student's t that are in every table, and the normal law's in the limit.
    assert [noise.deviations(n) for n in (2, 3, 11, 31)] == [12.706, 4.303, 2.228, 2.042]
    assert noise.deviations(61) == pytest.approx(2.000, abs=2e-3)
    assert noise.deviations(10**6) == pytest.approx(1.960, abs=1e-3)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_a_further_seed_of_the_same_law_is_within_the_band_19_times_of_20(seeds: int) -> None:
    draw = random.Random(0)
    within = 0
    for _ in range(1000):
        offsets = [draw.gauss(0, 1) for _ in range(seeds + 1)]
        *known, other = (dict.fromkeys(range(1, 21), offset) for offset in offsets)
        band = noise.noise_band(known, 2)
        within += abs(noise.gap(other, known[0], 2)[10]) <= band[10]
    # The known seed is one of those that gave the deviation, which makes it rarer still.
    assert 0.93 < within / 1000 < 0.99


def test_how_often_a_further_seed_leaves_the_band_somewhere() -> None:
    """What the module's docstring says, of runs whose differences wander with a memory of 50 steps."""
    draw = random.Random(0)

    def wander() -> dict[int, float]:
        at, found = draw.gauss(0, 1), {}
        for step in range(1, 201):
            at = 0.98 * at + math.sqrt(1 - 0.98**2) * draw.gauss(0, 1)
            found[step] = at
        return found

    outside = outside_fixed = 0
    for _ in range(300):
        *known, other = (wander() for _ in range(4))
        found = noise.widest(noise.gap(other, known[0], 10), noise.noise_band(known, 10))
        assert found is not None
        outside += not found.inside
        outside_fixed += found.share * noise.deviations(3) / 2 > 1
    assert 0.06 < outside / 300 < 0.17
    assert 0.6 < outside_fixed / 300 < 0.8


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
    assert abs(found.mean) > found.half_width
    assert noise.mean_difference({1: 1.0}, {1: 1.0}) is None


def test_slope_and_first_step_below() -> None:
    assert noise.slope({step: 5 - 0.25 * step for step in range(1, 11)}) == pytest.approx(-0.25)
    assert noise.slope({1: 1.0}) == 0
    assert noise.first_below({1: 3.0, 2: 2.0, 3: 2.5}, 2.0) == 2
    assert noise.first_below({1: 3.0}, 2.0) is None
