"""`octavo compare` on real runs, of a few dozen tokens a step: killed, gone on with, and reported."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.commands.compare import main
from octavo.commands.compare.activation_memory import saved_bytes
from octavo.commands.compare.executor import Executor, _RunProcess, exit_code
from octavo.commands.compare.runs import Plan, Run
from octavo.config import ConfigError
from tests.helpers import warm
from tests.helpers.launching import small_corpus
from tests.helpers.waiting import LIMIT, wait_for
from tests.models.own import own_model

STEPS = 16
# As many tokens as it takes for the gradients to be small: the control has to lose them.
SMALL = [
    *("--config_file=debug_model.toml", "--training.seq_len=128", "--checkpoint.interval=4"),
    "--training.mixed_precision_param=float32",
]


def command(out: Path, *flags: str) -> list[str]:
    asked = ["--steps", str(STEPS), "--recipes", "bf16,tensorwise", "--bf16-seeds", "2", "--jobs", "2"]
    corpus = f"--training.dataset={small_corpus()}"
    return [warm.python(), "-m", "octavo.cli", "compare", *SMALL, corpus, *asked, "--out", str(out), *flags]


def last_step(out: Path, run: str) -> int:
    path = out / "runs" / run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@dataclass(frozen=True)
class Comparison:
    """A comparison killed during its first runs at step `killed_at`, continued, and started again."""

    out: Path
    killed_at: int
    second: subprocess.CompletedProcess[str]
    third: subprocess.CompletedProcess[str]
    third_changed_metrics: bool

    def rows(self, run: str, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "runs" / run / file).read_text().splitlines()]

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return figures

    def folders(self, *runs: str) -> list[str]:
        return [str(self.out / "runs" / run) for run in runs]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("comparison")
    first = subprocess.Popen(command(out), stderr=subprocess.DEVNULL)
    wait_for("step 6 of bf16", lambda: last_step(out, "bf16") >= 6)
    first.kill()
    first.wait()
    killed_at = last_step(out, "bf16")

    def start() -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command(out), capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, done.stderr
        return done

    second = start()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.jsonl")}
    third = start()
    changed = stamps != {path: path.stat().st_mtime_ns for path in stamps}
    return Comparison(out, killed_at, second, third, changed)


def test_a_killed_comparison_resumes(comparison: Comparison) -> None:
    assert 6 <= comparison.killed_at < STEPS
    assert "bf16: resumes" in comparison.second.stderr
    log = (comparison.out / "runs" / "bf16" / "log.txt").read_text()
    assert log.count("Training starts at step 1.") == 1  # the second start resumed
    for run in ("bf16", "bf16_seed43", "tensorwise", "unscaled_e5m2"):
        assert [row["step"] for row in comparison.rows(run, "metrics.jsonl")] == list(range(1, STEPS + 1))
        assert exit_code(comparison.out / "runs" / run) == 0
        assert not (comparison.out / "runs" / run / "checkpoint").exists()


def test_the_report_has_verdicts_health_and_activation_memory(comparison: Comparison) -> None:
    figures = comparison.figures()
    runs = {run["name"]: run for run in figures["runs"]}
    assert runs["tensorwise"]["verdict"] == "inside"
    assert runs["unscaled_e5m2"]["verdict"] == "outside"
    assert figures["control_outside"] is True
    assert "unscaled_e5m2: outside" in comparison.third.stdout

    assert not runs["bf16"]["health"]
    for name in ("tensorwise", "unscaled_e5m2"):
        rows = comparison.rows(name, "health.jsonl")
        assert {row["step"] for row in rows} == {10}
        operands = {row["operand"] for row in rows}
        assert operands == set(runs[name]["health"]) == {"input", "weight", "grad_output"}

    assert runs["tensorwise"]["saved_bytes"] < 0.9 * runs["bf16"]["saved_bytes"]
    assert runs["unscaled_e5m2"]["saved_bytes"] is None


def test_finished_runs_are_not_repeated(comparison: Comparison) -> None:
    assert not comparison.third_changed_metrics
    assert "4 already finished" in comparison.third.stderr
    assert "starts" not in comparison.third.stderr


def test_a_model_of_the_users_own_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--config_file=debug_model.toml", "--training.seq_len=32"]
    counted = saved_bytes([*flags, *own_model(tmp_path, monkeypatch)], torch.float32)
    assert counted == saved_bytes(flags, torch.float32) > 0


def test_all_runs_read_the_same_batches_and_seeds_start_from_other_weights(comparison: Comparison) -> None:
    plan = json.loads((comparison.out / "comparison.json").read_text())
    flags = {run["name"]: run["flags"] for run in plan["runs"]}
    assert all("--training.data_seed=42" in each for each in flags.values())
    assert "--training.seed=43" in flags["bf16_seed43"]
    first = {name: comparison.rows(name, "metrics.jsonl")[0]["loss"] for name in flags}
    assert first["bf16"] != first["bf16_seed43"]
    assert first["bf16"] == pytest.approx(first["tensorwise"], abs=0.01)


def test_another_configuration_in_the_same_folder_is_one_error(comparison: Comparison) -> None:
    argv = command(comparison.out)[4:]
    with pytest.raises(ConfigError, match=r"optimizer.lr was 0.0008 and is 0.004") as error:
        main.main([*argv, "--optimizer.lr=0.004"])
    assert str(error.value).count("\n") == 0
    with pytest.raises(ConfigError, match="--steps was 16 and is 31"):
        main.main([*argv, "--steps", "31"])
    assert main.main([*argv, "--float8.health_every=4"]) == 0  # measuring health changes no loss


def test_finished_folders_are_compared(comparison: Comparison, tmp_path: Path) -> None:
    folders = comparison.folders("bf16", "tensorwise", "bf16_seed43")
    assert main.main([*folders, "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())
    whole = {run["name"]: run for run in comparison.figures()["runs"]}
    for run in figures["runs"]:
        for key in ("verdict", "widest", "gaps"):
            assert run[key] == whole[run["name"]][key]


def test_a_report_replaces_neither_a_run_nor_another_report(comparison: Comparison) -> None:
    folders = comparison.folders("bf16", "tensorwise")
    with pytest.raises(ConfigError, match="is one of the runs; name another folder"):
        main.main([*folders, "--out", folders[1]])
    with pytest.raises(ConfigError, match="holds a comparison that trains"):
        main.main([*folders, "--out", str(comparison.out)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--recipes", "rowise"],
            "--recipes: 'rowise' is not one of bf16, tensorwise.*did you mean 'rowwise'",
        ),
        (["--recipes", "rowwise,rowwise"], "names rowwise twice"),
        (["--steps", "0"], "--steps: expected a whole number from 1"),
        (["--bf16-seeds", "none"], "--bf16_seeds: expected a whole number"),
        (["--bf16-seeds", "1"], "--bf16_seeds: expected a whole number from 2 to 100"),
        (["--bf16-seeds", "1000"], "--bf16_seeds: expected a whole number from 2 to 100"),
        (["--recipes="], "--recipes=: names nothing to compare; name some of bf16, tensorwise"),
        (["--recipes", "unscaled_e5m2"], "names nothing to compare"),
        (["--training.steps=5"], "octavo compare sets this itself; use --steps"),
        (["--model.converters=float8"], "use --recipes"),
        (["--training.sequence=5"], "unknown flag"),
        (["--config_file=nowhere.toml"], "no such file"),
        (["--checkpoint.load_only"], "comparison"),
        (["nowhere", "nowhere2"], "nowhere: no such folder"),
        (["octavo"], "one run cannot be compared"),
        (["octavo", "octavo"], "named twice"),
        (["octavo", "tests", "--steps", "3"], "--steps: has no effect on octavo"),
        (["octavo", "tests"], "octavo is not a run's folder: there is no run.json"),
        (["--target_loss", "0"], "expected a number above 0"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ConfigError, match=message):
        main.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_several_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(ConfigError, match="starts runs on one machine"):
        main.main(["--out", str(tmp_path)])


def test_one_comparison_at_a_time_in_a_folder(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another octavo compare is at work"):
            main.main(["--out", str(tmp_path)])


def test_a_signal_stops_the_runs_and_asks_for_the_same_command(tmp_path: Path) -> None:
    flags = command(tmp_path, "--no-control")
    with subprocess.Popen(flags, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        for line in started.stderr:
            if "starts" in line:
                break
        os.kill(started.pid, signal.SIGTERM)
        rest = started.stderr.read()
        assert started.wait(timeout=LIMIT) == 75, rest
    assert "rerun the same command to continue" in rest


STEPPING = """
import json, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(sys.argv[1] + "/metrics.jsonl", "w") as file:
    for step in range(1, 401):
        print(json.dumps({"step": step, "loss": 1.0}), file=file, flush=True)
        time.sleep(0.01)
"""


def begin(executor: Executor, run: Run) -> _RunProcess:
    """In place of `Executor._start`: a run of 400 steps, and 4 s, which stops as it should."""
    folder = executor._plan.folder(run)
    folder.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", STEPPING, str(folder)])
    wait_for("the stand-in's handler", (folder / "metrics.jsonl").exists)
    return _RunProcess(run, process, (folder / "log.txt").open("ab"))


def plan_of(out: Path, *runs: Run) -> Plan:
    return Plan(out, runs, 400, 42, (), {}, processes=1, threads=None, command="octavo compare")


def test_a_signal_while_a_run_is_being_started_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(executor: Executor, run: Run) -> _RunProcess:
        active = begin(executor, run)
        os.kill(os.getpid(), signal.SIGTERM)
        return active

    monkeypatch.setattr(Executor, "_start", start)
    plan = plan_of(tmp_path, Run("bf16", "baseline", None, 42))
    assert Executor(plan, jobs=1, keep_checkpoints=False)() == 75
    assert last_step(tmp_path, "bf16") < 400


def test_the_control_ends_after_half_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "_start", begin)
    runs = (Run("bf16", "baseline", None, 42), Run("bad", "control", "unscaled_e5m2", 42))
    plan = plan_of(tmp_path, *runs)
    assert [plan.steps_of(run) for run in runs] == [400, 200]
    assert Executor(plan, jobs=2, keep_checkpoints=False)() == 0
    assert last_step(tmp_path, "bf16") == 400
    assert 200 <= last_step(tmp_path, "bad") < 400
    assert exit_code(tmp_path / "runs" / "bad") == 0
