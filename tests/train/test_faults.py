"""Whatever happens to a run: it ends with the documented exit code and message, and resumes bit for bit."""

import faulthandler
import json
import math
import os
import re
import signal
import subprocess

import pytest
import torch

from octavo.checkpoint.reader import read_model, read_state
from octavo.core.environment import STATUS_VARIABLE
from octavo.launch.launcher import plan
from octavo.train.watchdog import Watchdog
from tests.helpers import launching, warm
from tests.helpers.waiting import LIMIT, wait_for

FLAG = {**launching.shallow(4), "experimental.custom_import": "tests.helpers.faults"}
SAVES = {"checkpoint.enable": "true", "checkpoint.interval": 100, **FLAG}


def variable(kind, **where):
    """What tests/helpers/faults.py reads."""
    return {"OCTAVO_TEST_FAULT": json.dumps({"kind": kind, **where})}


@pytest.fixture
def fault(monkeypatch):
    """Sets the fault of the next runs; without arguments, none."""

    def set_fault(kind=None, **where):
        if kind is None:
            monkeypatch.delenv("OCTAVO_TEST_FAULT", raising=False)
        else:
            monkeypatch.setenv(*next(iter(variable(kind, **where).items())))

    return set_fault


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of one and two processes: the run, and the final parameters."""
    made = {}

    def get(world):
        if world not in made:
            folder = tmp_path_factory.mktemp(f"whole{world}")
            run = launching.train(folder, SAVES, world=world)
            made[world] = run, read_model(folder / "checkpoint" / "step-4")
        return made[world]

    return get


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def tell(run):
    """Losses, gradient norms and tokens: what must be equal, bit for bit."""
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in run.metrics]


# Signals


@pytest.mark.parametrize(
    ("kind", "world", "rank", "sent"),
    [
        ("signal", 1, 0, "SIGTERM"),
        ("signal", 2, 1, "SIGUSR1"),
        ("signal in save", 2, 1, "SIGTERM"),  # a second Ctrl-C, after a slow save, would end it at once
    ],
)
def test_signalled_run_saves_and_goes_on_bit_for_bit(kind, world, rank, sent, fault, whole, tmp_path):
    fault(kind, step=2, rank=rank, signal=sent)
    flags = {**SAVES, "checkpoint.interval": 2} if kind == "signal in save" else SAVES
    stopped = launching.train(tmp_path, flags, world=world)
    after = 3 if kind == "signal in save" else 2
    assert stopped.exit_codes == [75] * world
    assert f"Stopped by {sent} on rank {rank} after step {after}, which is saved." in stopped.log
    assert f"Rerun the command to continue with step {after + 1}" in stopped.log
    assert (tmp_path / "checkpoint" / f"step-{after}").is_dir()

    fault()
    resumed = launching.train(tmp_path, flags, world=world)
    run, parameters = whole(world)
    assert resumed.exit_codes == [0] * world
    assert tell(resumed) == tell(run)
    same(read_model(tmp_path / "checkpoint" / "step-4"), parameters)


def test_signal_in_a_validation(fault, tmp_path):
    fault("signal in validation", step=2, rank=0)
    validation = {"enable": "true", "freq": 2, "fraction": 0.1, "steps": 1}
    run = launching.train(
        tmp_path, {**SAVES, **{f"validation.{key}": value for key, value in validation.items()}}
    )
    assert run.exit_codes == [75]
    assert "after step 3, which is saved" in run.log
    assert len(re.findall("validate step:", run.log)) == 1


def test_signal_in_the_last_step_changes_nothing(fault, tmp_path):
    fault("signal", step=4)
    run = launching.train(tmp_path, SAVES)
    assert run.exit_codes == [0]
    assert "Training completed" in run.log


def test_signal_without_checkpoints_says_that_nothing_is_saved(fault, tmp_path):
    fault("signal", step=1)
    run = launching.train(tmp_path, {**FLAG})
    assert run.exit_codes == [128 + signal.SIGTERM]
    assert "Stopped by SIGTERM on rank 0 after step 1. Nothing was saved" in run.log
    assert len(run.losses) == 1


def test_signal_before_the_model_is_built(fault, tmp_path):
    """Building an 8B model on a CPU takes minutes."""
    fault("signal at import")
    run = launching.train(tmp_path, SAVES)
    assert run.exit_codes == [75]
    assert "Stopped by SIGTERM on rank 0 while starting. Rerun the command to start again" in run.log
    assert "Building" not in run.log


@pytest.mark.slow
def test_signal_during_the_first_compile(fault, tmp_path):
    fault("signal", step=1)
    flags = {**SAVES, "compile.enable": "true"}
    run = launching.train(tmp_path, flags)
    assert run.exit_codes == [75]
    assert "after step 1, which is saved" in run.log


# Bad numbers

BAD = "layers.2.feed_forward.w2"


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("activation", f"the output of {BAD} in forward, on rank 1"),
        ("gradient", f"the gradient of {BAD}'s output in backward, on rank 1"),
        ("weight", f"the weight {BAD}.weight, before the step"),
    ],
)
def test_stop_names_the_first_layer_and_operand(kind, named, fault, tmp_path):
    # a bad gradient for what the parent puts out, which is what the module itself puts out
    fault(kind, step=3, rank=1, module=BAD.removesuffix(".w2") if kind == "gradient" else BAD)
    run = launching.train(tmp_path, SAVES, world=2)
    assert run.exit_codes == [4, 4]
    assert "Step 3: stopped before the update: the " in run.log
    assert f"the first number that is not finite is in {named}. " in run.log
    assert "Traceback" not in run.log
    assert [line["step"] for line in run.metrics] == [1, 2, 3]


def test_skip_leaves_every_parameter_as_it_was(fault, tmp_path):
    fault("activation", step=3, rank=1, module=BAD)
    flags = {**SAVES, "checkpoint.interval": 1, "fault_tolerance.non_finite": "skip"}
    run = launching.train(tmp_path, flags, world=2)
    assert run.exit_codes == [0, 0]
    steps = tmp_path / "checkpoint"
    before, after, last = (read_model(steps / f"step-{n}") for n in (2, 3, 4))
    same(before, after)
    assert any(not torch.equal(after[name], last[name]) for name in after)
    assert "Step 3 is skipped without an update: the loss is nan" in run.log
    assert [line["skipped_steps"] for line in run.metrics] == [0, 0, 1, 1]
    assert [line["tokens"] for line in run.metrics] == [512 * n for n in (1, 2, 3, 4)]
    assert run.losses[2] is None
    assert math.isfinite(run.losses[3])
    state = read_state(steps / "step-4")
    assert state["guard"]["skipped"] == [3]


def test_skips_in_a_row_are_limited(fault, tmp_path):
    fault("activation", step=2, steps=10, module=BAD)
    flags = {**FLAG, "fault_tolerance.non_finite": "skip", "fault_tolerance.max_skips": 2}
    run = launching.train(tmp_path, flags)
    assert run.exit_codes == [4]
    assert "the 2 steps before were skipped too (fault_tolerance.max_skips)" in run.log
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]


def test_rewind_goes_back_and_past_the_data(fault, tmp_path):
    fault("activation", step=4, rank=1, module=BAD)
    flags = {**SAVES, "checkpoint.interval": 2, "training.steps": 5, "fault_tolerance.non_finite": "rewind"}
    run = launching.train(tmp_path, {**flags, "fault_tolerance.max_rewinds": 1}, world=2)
    assert run.exit_codes == [4, 4]  # the fault is at step 4 of the second try, too
    assert "Rewound to the checkpoint of step 2; the data continues after step 4" in run.log
    assert "the last checkpoint was already loaded 1 times (fault_tolerance.max_rewinds)" in run.log


def test_rewound_run_goes_on_to_its_end(fault, tmp_path):
    """Samples 12 to 19 are skipped: the third step after the fault reads what the fifth would have read."""
    fault("gradient", step=4, module=BAD, once=True)
    flags = {**SAVES, "checkpoint.interval": 2, "fault_tolerance.non_finite": "rewind"}
    run = launching.train(tmp_path, flags)
    assert run.exit_codes == [0]
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    assert [line["rewinds"] for line in run.metrics] == [0, 0, 1, 1]
    state = read_state(tmp_path / "checkpoint" / "step-4")
    assert state["data"]["global_sample"] == 4 * (4 + 2)
    assert state["tokens_seen"] == 4 * 4 * 64


def test_rewind_without_a_checkpoint_stops(fault, tmp_path):
    fault("activation", step=1, module=BAD)
    run = launching.train(tmp_path, {**SAVES, "fault_tolerance.non_finite": "rewind"})
    assert run.exit_codes == [4]
    assert "there is no checkpoint yet to go back to" in run.log


def test_spike_is_told_and_never_taken_in(fault, tmp_path):
    fault("spike", step=8, factor=3.0)
    flags = {"training.steps": 9, "fault_tolerance.spike_window": 5, **SAVES, "checkpoint.interval": 8}
    run = launching.train(tmp_path, flags)
    assert re.search(r"Step 8: the loss \d+\.\d+ is a spike, \d+\.\d deviations of ", run.log)
    assert [line["spikes"] for line in run.metrics] == [0] * 7 + [1, 1]
    at = [read_state(tmp_path / "checkpoint" / f"step-{n}")["guard"]["detector"]["losses"] for n in (8, 9)]
    assert at[0] == run.losses[2:7]  # the spike is not among them
    assert at[1] == [*run.losses[3:7], run.losses[8]]


# A launcher, and processes that die or hang


def launch(folder, flags, fault, *, ngpu=2):
    merged = {
        "job.dump_folder": folder,
        "training.dataset": launching.small_corpus(),
        **launching.TINY,
        **flags,
    }
    return subprocess.Popen(
        [warm.python(), "-m", "octavo.launch", *(f"--{key}={value}" for key, value in merged.items())],
        env={
            **os.environ,
            **fault,
            "NGPU": str(ngpu),
            "CONFIG_FILE": "debug_model.toml",
            "TMPDIR": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("code", [0, 75])
def test_death_of_a_rank_ends_the_job_soon_and_is_named(code, tmp_path):
    """0 is the hardest to notice: to torchrun it is a success. And 75 would say: start me again."""
    flags = {**FLAG, "comm.train_timeout_seconds": 10**4}  # soon: without a collective's timing out
    process = launch(tmp_path, flags, variable("exit", rank=1, step=3, code=code))
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    how = "exit code 0 before the run was over" if code == 0 else "exit code 75"
    assert f"octavo: rank 1 ended with {how} in step 3; " in err
    assert "Step 3: a collective broke off, since another process has ended" in err
    assert "Traceback" not in err


def test_hung_rank_ends_the_job_within_the_timeout_and_leaves_stacks(tmp_path):
    # In the second step, the first with that timeout: no step of a busy machine has to keep to it.
    flags = {**FLAG, "comm.init_timeout_seconds": 10**4, "comm.train_timeout_seconds": 4}
    process = launch(tmp_path, flags, variable("hang", rank=1, step=2))
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "Step 2: a collective timed out, since another process hangs or has died" in err
    ended = "octavo: rank 0 ended with exit code 1 in step 2; still running and killed: rank 1 in step 2"
    assert ended in err
    assert "Traceback" not in err
    assert f"Python stacks: {tmp_path / 'stacks'}" in err
    waited, hung = ((tmp_path / "stacks" / f"rank{rank}.txt").read_text() for rank in range(2))
    assert "before_step" in hung
    assert "gradients" in waited or "all_reduce" in waited


@pytest.mark.parametrize(("degree", "seconds"), [(1, 30), (2, 21)])
def test_a_stage_that_hangs_is_ended_at_the_timeout(degree, seconds, monkeypatch):
    """Elsewhere a collective's own error comes first; a pipeline's receive has none."""
    environ = {"NGPU": "2", "CONFIG_FILE": "debug_model.toml"}
    planned = plan([f"--parallelism.pipeline_parallel_degree={degree}"], environ, gpus=0, cores=2)
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    monkeypatch.delenv(STATUS_VARIABLE, raising=False)
    for name, value in {**planned.environment, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with Watchdog() as watchdog:
        watchdog.begin(2, 20)
    assert armed == [seconds]


def test_signal_to_the_launcher_during_steps(tmp_path):
    sent = signal.SIGTERM
    process = launch(tmp_path, {**SAVES, "training.steps": 10**6}, {})
    wait_for(
        "a report or an end", lambda: process.poll() is not None or (tmp_path / "metrics.jsonl").exists()
    )
    process.send_signal(sent)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, err
    step = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert f"Stopped by {sent.name} on rank 0, {sent.name} on rank 1 after step {step}, which is saved" in err
    assert [path.name for path in (tmp_path / "checkpoint").glob("step-*")] == [f"step-{step}"]
    assert json.loads((tmp_path / "checkpoint" / f"step-{step}" / "state.json").read_text())["step"] == step
    assert not list(tmp_path.glob("octavo-logs-*"))
