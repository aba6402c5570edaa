"""A user's hook works without a change to octavo; hooks are called at their points, in their order."""

import json
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from octavo.config.schema import FaultTolerance
from octavo.train.builtin_hooks import ReportMetrics
from octavo.train.hooks import Hook, Hooks, StepRecord, register
from octavo.train.nonfinite_guard import Guard
from octavo.train.quantization import DelayedScalingSteps
from tests.docs.commands import ROOT, files_of
from tests.helpers import launching

SHOWN = files_of(ROOT / "docs" / "your_own_model.md")["layer_norms.py"]


def lines(folder):
    return [json.loads(line) for line in (folder / "layer_norms.jsonl").read_text().splitlines()]


def test_the_hook_on_the_page_logs_the_norm_of_each_layer(tmp_path, monkeypatch):
    """On one process and on two with sharded gradients; a resumed run has each step once."""
    (tmp_path / "layer_norms.py").write_text(
        f"{SHOWN}\nfrom tests.models import shallow_llama as shallow_llama\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = {
        **launching.shallow(2),
        "experimental.custom_import": "layer_norms",
        "training.global_batch_size": 8,
        "checkpoint.enable": True,
    }
    launching.train(tmp_path / "one", {**flags, "training.steps": 2})
    one = launching.train(tmp_path / "one", {**flags, "training.steps": 3})
    two = launching.train(tmp_path / "two", {**flags, "training.steps": 3}, world=2)
    assert "layer_norms" not in sys.modules  # the runs are forks
    assert two.exit_codes == [0, 0]
    found = lines(tmp_path / "one")
    assert [line.pop("step") for line in found] == [1, 2, 3]
    for norms, alone, step in zip(lines(tmp_path / "two"), found, one.metrics, strict=True):
        assert alone.keys() == {"0", "1"}
        assert {name: norms[name] for name in alone} == pytest.approx(alone, rel=1e-4)
        assert 0 < sum(norm**2 for norm in alone.values()) ** 0.5 < step["grad_norm"]


class Tell(Hook):
    def __init__(self, name, told, fails=False):
        self.name, self.told, self.fails = name, told, fails

    def on_start(self, step):
        self.told.append((self.name, "start", step))
        if self.fails:
            raise ValueError("no")

    def on_end(self):
        self.told.append((self.name, "end"))


def test_hooks_end_in_reverse_order_also_when_one_fails():
    told = []
    hooks = Hooks([Tell("a", told), Tell("b", told, fails=True), Tell("c", told)])
    with pytest.raises(ValueError, match="no"), hooks.running(3):
        raise AssertionError("training must not start")
    assert told == [("a", "start", 3), ("b", "start", 3), ("b", "end"), ("a", "end")]


@dataclass
class Metrics:
    """In place of a `MetricsLogger` with log_freq = 10."""

    reported: list[int] = field(default_factory=list)

    def due(self, step):
        return step == 1 or step % 10 == 0

    def report(self, *, step, **_):
        self.reported.append(step)

    def add_batch(self, tokens, seconds): ...

    def end_step(self): ...


@pytest.mark.parametrize(("stopped", "reported"), [(None, [1, 10, 12]), (5, [1, 5])])
def test_the_last_step_is_reported_also_that_of_a_stopped_run(stopped, reported):
    metrics, world = Metrics(), SimpleNamespace(tokens_shared=1, largest_mean=float)
    hook = ReportMetrics(metrics, world, Guard(FaultTolerance()), DelayedScalingSteps(None), last_step=12)
    for step in range(1, (stopped or 12) + 1):
        record = StepRecord(step, lr=1e-3)
        record.loss = record.local_loss = record.grad_norm = record.tokens_seen = 1
        record.stops = float(step == stopped)
        hook.after_step(record)
    assert metrics.reported == reported


def test_what_is_no_hook_is_refused():
    with pytest.raises(TypeError, match=r"Watcher is no hook: derive it from octavo.train.hooks.Hook"):

        @register
        class Watcher:
            pass
