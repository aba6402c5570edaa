"""The guard's decisions, and the statistics that find spikes."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.config.schema import FaultTolerance
from octavo.train.hooks import GuardAction
from octavo.train.loss_spikes import LASTING, LEAST, SpikeDetector
from octavo.train.nonfinite_guard import Guard


def guard(**settings):
    return Guard(FaultTolerance(**settings))


def noise(count, *, level=3.0, seed=0):
    source = random.Random(seed)
    return [level + source.gauss(0, 0.05) for _ in range(count)]


def feed(judging, losses, first=1):
    return [judging.judge(step, loss, 1.0).action for step, loss in enumerate(losses, first)]


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, -math.inf)]
)
@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_what_is_not_finite_never_updates(loss, norm, policy):
    verdict = guard(non_finite=policy).judge(7, loss, norm)
    assert verdict.action is GuardAction(policy)
    assert verdict.non_finite
    assert verdict.reason in (f"the loss is {loss}", f"the gradient norm is {norm}")


def test_skips_in_a_row_are_counted_in_a_row():
    judging = guard(non_finite="skip", max_skips=2)
    bad, good = math.nan, 2.0
    assert feed(judging, [bad, bad, good, bad, bad, bad]) == [
        getattr(GuardAction, name) for name in ["SKIP", "SKIP", "UPDATE", "SKIP", "SKIP", "STOP"]
    ]
    assert judging.skipped == [1, 2, 4, 5]
    assert judging.counts()["skipped_steps"] == 4


def test_rewinds_are_counted_from_one_checkpoint():
    judging = guard(non_finite="rewind", max_rewinds=2)
    judging.saved(10)
    state = judging.state_dict()
    for _ in range(2):
        assert judging.judge(12, math.nan, 1.0).action is GuardAction.REWIND
        judging.rewound(state)
        judging.saved(10)
    assert judging.judge(12, math.nan, 1.0).action is GuardAction.STOP
    judging.saved(20)
    assert judging.judge(22, math.nan, 1.0).action is GuardAction.REWIND
    assert judging.rewinds == 2


def test_a_spike_is_found_warned_of_and_not_taken_in(caplog):
    losses = noise(100)
    judging = guard(spike="warn")
    assert set(feed(judging, losses)) == {GuardAction.UPDATE}
    before = judging.state_dict()["detector"]["losses"]
    verdict = judging.judge(101, 4.0, 9.0)
    assert verdict.action is GuardAction.UPDATE
    center = statistics.median(losses)
    assert "the loss 4.0000 is a spike, " in verdict.reason
    assert f"above the median {center:.4f} of the last 100 losses (gradient norm 9.0000)" in verdict.reason
    assert judging.state_dict()["detector"]["losses"] == before
    assert judging.counts()["spikes"] == 1


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_spike_follows_its_own_policy(policy):
    judging = guard(spike=policy, non_finite="stop")
    feed(judging, noise(LEAST))
    assert judging.judge(21, 9.0, 1.0).action is GuardAction(policy)
    assert judging.judge(22, math.nan, 1.0).action is GuardAction.STOP


def test_off_means_off():
    judging = guard(spike="off")
    feed(judging, noise(50))
    assert not judging.judge(51, 100.0, 1.0).reason


def test_a_falling_loss_has_no_spikes():
    falling = [2 + 8 * math.exp(-step / 60) + extra for step, extra in enumerate(noise(400, level=0.0))]
    judging = guard(spike="warn")
    feed(judging, falling)
    assert judging.spikes == 0


def test_a_lasting_level_is_a_new_level():
    judging = guard(spike="warn")
    feed(judging, noise(100))
    feed(judging, noise(LASTING + LEAST + 5, level=6.0), first=101)
    assert judging.spikes == LASTING
    assert judging.judge(200, 6.0, 1.0).reason == ""


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=30))
def test_statistics_never_hold_what_is_not_finite(losses):
    judging = guard(non_finite="skip", max_skips=100, spike_window=5)
    for step, loss in enumerate(losses):
        judging.judge(step, loss, 1.0)
    assert all(math.isfinite(x) for x in judging.state_dict()["detector"]["losses"])


def test_resumed_guard_judges_as_the_other_would():
    losses = [*noise(60), 9.0, *noise(30, seed=1), math.nan, 9.0]
    whole = guard(non_finite="skip")
    expected = [whole.judge(step, loss, 1.0) for step, loss in enumerate(losses)]
    first, second = guard(non_finite="skip"), guard(non_finite="skip")
    got = [first.judge(step, loss, 1.0) for step, loss in enumerate(losses[:61])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.judge(step, loss, 1.0) for step, loss in enumerate(losses[61:], 61)]
    assert got == expected
    assert second.state_dict() == whole.state_dict()


def test_a_constant_loss_is_judged_by_a_share_of_itself():
    detector = SpikeDetector(10, threshold=8.0)
    for _ in range(10):
        detector.absorb(2.0)
    assert detector.judge(2.07) is None
    assert detector.judge(2.09) is not None
