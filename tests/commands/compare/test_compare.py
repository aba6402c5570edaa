"""`octavo compare` on real runs, of a few dozen tokens a step: killed, gone on with, and reported."""

import json
import os
import signal
import subprocess
import sys
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


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison that was killed in the middle of its first runs, gone on with, and called once more."""
    out = tmp_path_factory.mktemp("comparison")
    first = subprocess.Popen(command(out), stderr=subprocess.DEVNULL)
    wait_for("step 6 of bf16", lambda: last_step(out, "bf16") >= 6)
    first.kill()
    first.wait()
    at = last_step(out, "bf16")
    second = subprocess.run(command(out), capture_output=True, text=True, timeout=LIMIT, check=False)
    assert second.returncode == 0, second.stderr
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.jsonl")}
    third = subprocess.run(command(out), capture_output=True, text=True, timeout=LIMIT, check=False)
    assert third.returncode == 0, third.stderr
    untouched = stamps == {path: path.stat().st_mtime_ns for path in stamps}
    return out, {"at": at, "second": second, "third": third, "untouched": untouched}


def test_a_killed_comparison_goes_on_where_it_was(killed_twice: tuple[Path, dict[str, Any]]) -> None:
    out, told = killed_twice
    assert 6 <= told["at"] < STEPS
    assert "bf16: resumes" in told["second"].stderr
    log = (out / "runs" / "bf16" / "log.txt").read_text()
    assert log.count("Training starts at step 1.") == 1  # the second start resumed
    for run in ("bf16", "bf16_seed43", "tensorwise", "unscaled_e5m2"):
        lines = (out / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
        assert exit_code(out / "runs" / run) == 0
        assert not (out / "runs" / run / "checkpoint").exists()


def test_the_health_of_every_float8_layer_is_in_the_report(killed_twice: tuple[Path, dict[str, Any]]) -> None:
    out, _ = killed_twice
    figures = json.loads((out / "report.json").read_text())
    health = {run["name"]: run.get("health") for run in figures["runs"]}
    assert not health["bf16"]
    for run in ("tensorwise", "unscaled_e5m2"):
        rows = [json.loads(line) for line in (out / "runs" / run / "health.jsonl").read_text().splitlines()]
        assert {row["step"] for row in rows} == {10}
        assert {row["operand"] for row in rows} == set(health[run]) == {"input", "weight", "grad_output"}


def test_finished_runs_are_not_repeated(killed_twice: tuple[Path, dict[str, Any]]) -> None:
    _, told = killed_twice
    assert told["untouched"]
    assert "4 already finished" in told["third"].stderr
    assert "starts" not in told["third"].stderr


def test_the_control_is_outside_and_the_recipe_inside(killed_twice: tuple[Path, dict[str, Any]]) -> None:
    out, told = killed_twice
    figures = json.loads((out / "report.json").read_text())
    verdicts = {run["name"]: run["verdict"] for run in figures["runs"]}
    assert verdicts["tensorwise"] == "inside"
    assert verdicts["unscaled_e5m2"] == "outside"
    assert figures["control_outside"] is True
    assert "unscaled_e5m2: outside" in told["third"].stdout


def test_float8_keeps_less_for_backward(killed_twice: tuple[Path, dict[str, Any]]) -> None:
    out, _ = killed_twice
    kept = {run["name"]: run["saved_bytes"] for run in json.loads((out / "report.json").read_text())["runs"]}
    assert kept["tensorwise"] < 0.9 * kept["bf16"]
    assert kept["unscaled_e5m2"] is None


def test_a_model_of_the_users_own_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--config_file=debug_model.toml", "--training.seq_len=32"]
    counted = saved_bytes([*flags, *own_model(tmp_path, monkeypatch)], torch.float32)
    assert counted == saved_bytes(flags, torch.float32) > 0


def test_all_runs_read_the_same_batches_and_seeds_start_from_other_weights(
    killed_twice: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = killed_twice
    plan = json.loads((out / "comparison.json").read_text())
    flags = {run["name"]: run["flags"] for run in plan["runs"]}
    assert all("--training.data_seed=42" in each for each in flags.values())
    assert "--training.seed=43" in flags["bf16_seed43"]
    first = {
        name: json.loads((out / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in flags
    }
    assert first["bf16"] != first["bf16_seed43"]
    assert first["bf16"] == pytest.approx(first["tensorwise"], abs=0.01)


def test_another_configuration_in_the_same_folder_is_one_error(
    killed_twice: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = killed_twice
    argv = command(out)[4:]
    with pytest.raises(ConfigError, match=r"optimizer.lr was 0.0008 and is 0.004") as error:
        main.main([*argv, "--optimizer.lr=0.004"])
    assert str(error.value).count("\n") == 0
    with pytest.raises(ConfigError, match="--steps was 16 and is 31"):
        main.main([*argv, "--steps", "31"])


def test_finished_folders_are_compared(killed_twice: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = killed_twice
    names = ["bf16", "tensorwise", "bf16_seed43"]
    assert main.main([*(str(out / "runs" / name) for name in names), "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())
    whole = json.loads((out / "report.json").read_text())
    for run in figures["runs"]:
        (same,) = [one for one in whole["runs"] if one["name"] == run["name"]]
        assert (run["verdict"], run["widest"], run["gaps"]) == (same["verdict"], same["widest"], same["gaps"])


def test_a_report_does_not_go_into_one_of_its_runs(killed_twice: tuple[Path, dict[str, Any]]) -> None:
    out, _ = killed_twice
    folders = [str(out / "runs" / name) for name in ("bf16", "tensorwise")]
    with pytest.raises(ConfigError, match="is one of the runs; name another folder"):
        main.main([*folders, "--out", folders[1]])


def test_measuring_health_otherwise_is_no_other_comparison(
    killed_twice: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = killed_twice
    assert main.main([*command(out)[4:], "--float8.health_every=4"]) == 0


def test_a_report_on_folders_does_not_replace_another(killed_twice: tuple[Path, dict[str, Any]]) -> None:
    out, _ = killed_twice
    folders = [str(out / "runs" / name) for name in ("bf16", "tensorwise")]
    with pytest.raises(ConfigError, match="holds a comparison that trains"):
        main.main([*folders, "--out", str(out)])


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
