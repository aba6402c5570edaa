"""Log lines, JSON lines and TensorBoard events tell the same, correct figures."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from octavo.config.schema import Metrics
from octavo.metrics import logger as metrics
from octavo.metrics.device import DeviceMemory, Peak
from octavo.metrics.jsonl import Jsonl
from octavo.metrics.logger import MetricsLogger, StepReport, _Colors, format_line
from octavo.metrics.mfu import Work
from octavo.train.validate import ValidationReport


def report(**changes):
    values = {
        "step": 1,
        "loss": 12.22544,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "tokens": 8192,
        "memory_gib": 27.341,
        "memory_percent": 28.784,
        "tps": 1375.4,
        "tflops": 1021.728,
        "mfu": 2.2,
        "seconds": 0.5,
        "data_seconds": 0.01,
        "saving_seconds": 0.2,
        "interval_steps": 1,
    }
    return StepReport(**{**values, **changes})


def test_line_is_the_one_that_readers_know():
    plain = _Colors(on=False)
    assert format_line(report(), plain, grad_norm=False) == (
        "step:  1  loss: 12.2254  memory: 27.34GiB(28.78%)  tps: 1,375  tflops: 1,021.73  mfu: 2.20%"
    )
    assert "loss: 12.2254  grad_norm:  1.5000  memory" in format_line(report(), plain, grad_norm=True)
    assert format_line(report(mfu=None), plain, grad_norm=False).endswith("mfu: n/a")
    assert "\033[32m" in format_line(report(), _Colors(on=True), grad_norm=False)


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(metrics, "memory_in_use", lambda device: DeviceMemory(1.5, 12.5, 1.25, 10.0, 2, 0))
    return clock


def build(folder, rank=0, **settings):
    return MetricsLogger(
        Metrics(**settings),
        folder,
        rank=rank,
        device=torch.device("cpu"),
        work=Work({"bfloat16": 2e6}, {}),
        peak=Peak(1e10, "made up", {"bfloat16": 1e10}),
        color=False,
        steps=10,
        epoch_tokens=4000,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step(logger, clock, number, *, seconds=2.0, waited=0.5, tokens=1000):
    logger.add_batch(tokens, waited)
    clock.now += seconds
    logger.end_step()
    if logger.due(number):
        return logger.report(step=number, loss=1 / 3, grad_norm=0.1, lr=1e-3, tokens=number * tokens)
    return None


def test_progress_follows_the_line_where_it_is_asked_for(tmp_path, clock, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    caplog.set_level("INFO", logger="octavo")
    logger = build(tmp_path, log_freq=1, log_progress=True)
    for number in (1, 2, 3):
        step(logger, clock, number, seconds=60.0)
    assert "progress: 1/10  eta: n/a  lr: 1.00e-03  epoch: 0.25" in caplog.messages[0]
    assert caplog.messages[-1].endswith("%  progress: 3/10  eta: 0:07:00  lr: 1.00e-03  epoch: 0.75")
    step(build(tmp_path, log_freq=1), clock, 1)
    assert caplog.messages[-1].endswith("%")


def test_rates_count_the_steps_since_the_last_report(tmp_path, clock):
    logger = build(tmp_path, log_freq=4)
    logger.start(0)
    reports = {number: step(logger, clock, number) for number in range(1, 9)}
    assert [number for number, made in reports.items() if made] == [1, 4, 8]
    assert [made.interval_steps for made in reports.values() if made] == [1, 3, 4]
    for made in filter(None, reports.values()):
        assert made.tps == pytest.approx(500)
        assert made.tflops == pytest.approx(1e-3)
        assert made.mfu == pytest.approx(10)
        assert made.seconds == pytest.approx(2)
        assert made.data_seconds == pytest.approx(0.5)
        assert made.saving_seconds == 0


def test_time_for_saves_is_told_once(tmp_path, clock):
    logger = build(tmp_path, log_freq=2)
    logger.start(0)
    step(logger, clock, 1)
    for seconds in (0.25, 0.5):
        logger.add_saving(seconds)
    assert step(logger, clock, 2).saving_seconds == 0.75
    step(logger, clock, 3)
    assert step(logger, clock, 4).saving_seconds == 0


def test_time_before_the_start_does_not_count(tmp_path, clock):
    logger = build(tmp_path)
    clock.now += 1000
    logger.start(0)
    assert step(logger, clock, 1).tps == pytest.approx(500)


def test_json_lines_hold_full_precision(tmp_path, clock):
    logger = build(tmp_path, log_freq=1)
    logger.start(0)
    step(logger, clock, 1)
    step(logger, clock, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert lines(tmp_path)[0]["loss"] == 1 / 3


def test_a_resumed_run_has_each_step_once(tmp_path, clock):
    logger = build(tmp_path, log_freq=1)
    logger.start(0)
    for number in (1, 2, 3, 4):
        step(logger, clock, number)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    resumed = build(tmp_path, log_freq=1)
    resumed.start(2)
    step(resumed, clock, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_lines_that_are_not_ours_are_dropped(tmp_path, clock):
    logger = build(tmp_path, log_freq=1)
    logger.start(0)
    step(logger, clock, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"foo": 1}\ngarbage}\n[1]\n')
    build(tmp_path, log_freq=1).start(1)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_json_stays_json(tmp_path, clock, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    logger = build(tmp_path, log_freq=1)
    logger.start(0)
    logger.add_batch(1, 0.0)
    clock.now += 1
    logger.end_step()
    with caplog.at_level("INFO", logger="octavo"):
        logger.report(step=1, loss=math.nan, grad_norm=math.inf, lr=1e-3, tokens=1)
    assert lines(tmp_path)[0]["loss"] is None
    assert lines(tmp_path)[0]["grad_norm"] is None


def test_new_run_puts_the_old_file_aside(tmp_path, clock):
    for _ in range(2):
        logger = build(tmp_path, log_freq=1)
        logger.start(0)
        step(logger, clock, 1)
    assert len(lines(tmp_path)) == 1
    assert len(list(tmp_path.glob("metrics.*.jsonl"))) == 1


def test_other_ranks_write_no_file(tmp_path, clock):
    logger = build(tmp_path, rank=1, log_freq=1)
    logger.start(0)
    step(logger, clock, 1)
    assert not list(tmp_path.iterdir())


def test_tensorboard_events_read_back(tmp_path, clock):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = build(tmp_path, log_freq=1, enable_tensorboard=True)
    logger.start(0)
    step(logger, clock, 1)
    logger.close()
    (folder,) = (tmp_path / "tb").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert events.Scalars("loss_metrics/global_avg_loss")[0].value == pytest.approx(1 / 3)
    assert events.Scalars("throughput(tps)")[0].value == pytest.approx(500)
    assert events.Scalars("time_metrics/data_loading(%)")[0].value == pytest.approx(25)


def test_trackers_get_the_names_that_dashboards_know(tmp_path, clock):
    """The left column of torchtitan's dashboards."""
    logger = build(tmp_path, log_freq=1)
    tracked = {}
    logger._trackers.append(type("Fake", (), {"write": lambda _, values, step: tracked.update(values)})())
    logger.start(0)
    logger.add_batch(1000, 0.5)
    clock.now += 2
    logger.end_step()
    logger.report(step=1, loss=2.0, loss_max=3.0, grad_norm=0.1, lr=1e-3, tokens=7)
    expected = {
        "loss_metrics/global_avg_loss": 2.0,
        "loss_metrics/global_max_loss": 3.0,
        "grad_norm": 0.1,
        "lr": 1e-3,
        "throughput(tps)": 500,
        "tflops": 1e-3,
        "mfu(%)": 10,
        "time_metrics/end_to_end(s)": 2,
        "time_metrics/data_loading(s)": 0.5,
        "time_metrics/data_loading(%)": 25,
        "memory/max_reserved(GiB)": 1.5,
        "memory/max_reserved(%)": 12.5,
        "memory/max_active(GiB)": 1.25,
        "memory/max_active(%)": 10.0,
        "memory/num_ooms": 0,
        "memory/num_alloc_retries": 2,
        "n_tokens_seen": 7,
        "mfu_mixed(%)": 10,
        "hfu(%)": 10,
    }
    assert {name: tracked.get(name) for name in expected} == pytest.approx(expected)
    assert "time_metrics/step_p50(s)" not in tracked  # no step but the first: not known


def test_validation_reaches_the_trackers_and_no_rate(tmp_path, clock):
    logger = build(tmp_path, log_freq=1)
    tracked = {}
    logger._trackers.append(type("Fake", (), {"write": lambda _, values, step: tracked.update(values)})())
    logger.start(0)
    step(logger, clock, 1)
    clock.now += 50
    logger.report_validation(1, ValidationReport(loss=3.5, bits_per_byte=1.25, tokens=10, seconds=50.0))
    assert tracked["validation_metrics/global_avg_loss"] == 3.5
    assert tracked["validation_metrics/bits_per_byte"] == 1.25
    assert step(logger, clock, 2).tps == pytest.approx(500)
    assert lines(tmp_path)[-1]["step_p99"] == pytest.approx(2)


def test_the_summary_covers_steady_steps(tmp_path, clock, monkeypatch):
    compiled = [0.0]
    monkeypatch.setattr(metrics, "seconds_compiling", lambda: compiled[0])
    logger = build(tmp_path, log_freq=100)
    logger.start(0)
    assert logger.summary() is None
    compiled[0] = 7.0
    step(logger, clock, 1, seconds=10.0)
    for number in range(2, 12):
        logger.add_saving(3.0)
        clock.now += 3.0
        step(logger, clock, number)
    compiled[0] = 12.0
    assert step(logger, clock, 12, seconds=9.0) is None
    assert logger.summary() == (
        "10 steps took at most 2.000 s (half of them), 2.000 s (90%), 2.000 s (99%); "
        "the first took 10.000 s, compiling 12.0 s in it and 1 others. "
        "Waited for data 25.00% of the time. tps 500, mfu 10.00%, mfu_mixed 10.00%, hfu 10.00%"
    )


def test_colors_can_be_turned_off(tmp_path, clock, caplog, monkeypatch):
    logger = build(tmp_path, log_freq=1, disable_color_printing=True)
    logger.start(0)
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    with caplog.at_level("INFO", logger="octavo"):
        step(logger, clock, 1)
    assert "\033[" not in caplog.text
    assert "step:  1" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, clock, caplog):
    logger = build(tmp_path, log_freq=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.metrics.jsonl.open_append", lambda path: Path("/dev/full").open("ab"))  # noqa: SIM115 - closed there
        assert step(logger, clock, 1) is not None
    assert "metrics.jsonl: a line could not be written: No space left on device" in caplog.text
    step(logger, clock, 2)
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_metrics_are_never_written_through_a_link(tmp_path):
    (tmp_path / "old").write_text('{"step": 1}\n{"step": 5}\n')
    for target, step in (("missing", 0), ("old", 3), ("old", 0)):
        path = tmp_path / "metrics.jsonl"
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / target)
        rows = Jsonl(path)
        rows.start(step)
        rows.write({"step": step + 1})
        assert not path.is_symlink()
    path.unlink()
    path.symlink_to(tmp_path / "missing")  # made during the run
    rows.write({"step": 7})
    assert (tmp_path / "old").read_text() == '{"step": 1}\n{"step": 5}\n'
    assert not (tmp_path / "missing").exists()
