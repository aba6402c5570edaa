"""Percentiles are times that were measured, of the steps that are alike."""

import pytest
import torch

from octavo.metrics.step_times import RECENT, Percentiles, StepTimes, percentiles_of, seconds_compiling


def test_percentiles_by_nearest_rank():
    assert percentiles_of([]) is None
    assert percentiles_of([3.0]) == Percentiles(3.0, 3.0, 3.0)
    assert percentiles_of([float(n) for n in range(100, 0, -1)]) == Percentiles(50.0, 90.0, 99.0)
    assert percentiles_of([1.0, 2.0, 3.0, 10.0]) == Percentiles(2.0, 10.0, 10.0)


def test_first_and_compiling_steps_are_apart_and_pauses_no_part_of_any():
    times = StepTimes()
    times.start(100.0)
    times.end(130.0, compiling=25.0)
    times.end(131.0, compiling=0.0)
    times.pause(5.0)
    times.end(137.5, compiling=0.0)
    times.end(150.0, compiling=12.0)
    times.end(151.0, compiling=0.0)
    assert times.first == 30.0
    assert list(times.steady) == [1.0, 1.5, 1.0]
    assert (times.compiling, times.compiling_steps) == (37.0, 1)
    times.start(200.0)  # went back to a checkpoint
    times.end(209.0, compiling=0.0)
    assert list(times.steady) == [1.0, 1.5, 1.0]


def test_recent_ones_are_recent():
    times = StepTimes()
    times.start(0.0)
    now = 0.0
    for seconds in [1.0, *[50.0] * 10, *[2.0] * RECENT]:
        now += seconds
        times.end(now, compiling=0.0)
    assert times.recent() == Percentiles(2.0, 2.0, 2.0)
    assert times.all().p99 == 2.0
    assert max(times.steady) == 50.0


def test_compiling_is_seen_forward_and_backward():
    before = seconds_compiling()
    assert seconds_compiling() == before
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: x.sin() * 2, backend="aot_eager")(x).sum().backward()
    assert seconds_compiling() > before
    assert seconds_compiling() == pytest.approx(before, abs=60)
