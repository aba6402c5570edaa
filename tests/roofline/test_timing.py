"""Timing in turn: order, pairs and statistics. Nothing here asserts a speed."""

import time

import pytest
import torch

from octavo.roofline.timing import Spread, paired, time_in_turn

CPU = torch.device("cpu")


def test_rounds_and_their_order():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = time_in_turn(sides, CPU, rounds=6, warmup=2)
    assert calls[:6] == list("aabbcc")
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert [r[0] for r in rounds] == list("abcabc")
    assert {frozenset(r) for r in rounds} == {frozenset("abc")}
    assert len({r[1:] for r in rounds}) > 3  # no side always follows the same other
    assert all(len(spread.values) == 6 and spread.least > 0 for spread in times.values())


def test_no_round_begins_after_its_time():
    sides = {"a": lambda: time.sleep(0.01)}
    assert len(time_in_turn(sides, CPU, rounds=50, until=time.perf_counter() + 0.05)["a"].values) < 10
    assert len(time_in_turn(sides, CPU, rounds=50, until=0.0)["a"].values) == 1


def test_statistics():
    spread = Spread((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (spread.median, spread.quartiles, spread.least, spread.most) == (3.0, (2.0, 4.0), 1.0, 5.0)
    assert Spread((2.0,)).quartiles == (2.0, 2.0)
    # Within rounds: a machine that slows down halfway changes both sides, and not their ratio.
    assert paired((2.0, 20.0), (1.0, 10.0)).values == (2.0, 2.0)
    with pytest.raises(ValueError, match="shorter|longer"):
        paired((1.0,), (1.0, 2.0))


def test_nothing_to_time():
    with pytest.raises(ValueError, match="0 sides in 3 rounds"):
        time_in_turn({}, CPU, rounds=3)
    with pytest.raises(ValueError, match="1 sides in 0 rounds"):
        time_in_turn({"a": int}, CPU, rounds=0)
