"""The schedule by hand-computed values."""

import pytest
import torch

from octavo.config.schema import LRScheduler
from octavo.optim.lr_schedule import lr_factor, set_lr


def factors(steps, **settings):
    return [lr_factor(step, steps, LRScheduler(**settings)) for step in range(1, steps + 1)]


def test_warmup_then_stable():
    assert factors(6, warmup_steps=3, decay_ratio=0.0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_over_the_last_part():
    assert factors(10, warmup_steps=0, decay_ratio=0.4) == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25])


def test_decay_from_the_end_of_warmup_by_default():
    assert factors(6, warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_decay_ends_at_the_minimum():
    last = factors(1000, warmup_steps=0, min_lr_factor=0.1)[-1]
    assert last == pytest.approx(0.1, abs=2e-3)
    assert last > 0.1


@pytest.mark.parametrize(("kind", "halfway"), [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("cosine", 0.5)])
def test_shapes_at_half_way(kind, halfway):
    assert factors(8, warmup_steps=0, decay_type=kind)[4] == pytest.approx(halfway)


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
def test_no_step_has_rate_zero_and_none_rises_after_warmup(kind):
    rates = factors(40, warmup_steps=5, decay_ratio=0.5, decay_type=kind)
    assert min(rates) > 0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[:6] == sorted(rates[:6])


def test_warmup_longer_than_the_run():
    assert factors(2, warmup_steps=200) == pytest.approx([1 / 3, 2 / 3])


def test_a_short_run_of_a_long_schedule_is_its_beginning():
    long = factors(12, warmup_steps=2, decay_ratio=0.5)
    assert factors(7, warmup_steps=2, decay_ratio=0.5, total_steps=12) == long[:7]


def test_set_lr_reaches_every_group():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [a]}, {"params": [b], "lr": 7.0}])
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
