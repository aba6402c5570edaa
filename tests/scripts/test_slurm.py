"""The Slurm job, with a Slurm that is two scripts: it trains, saves before its end, is requeued, goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers import launching, warm
from tests.helpers.waiting import LIMIT, wait_for, wait_for_text

# srun as the job uses it: tasks on this machine, each with its number and its output; signals go on to
# all of them, and the exit code is the highest.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
command = command if not os.environ.get("FAKE_COMMAND") else os.environ["FAKE_COMMAND"].split()
tasks = []
for number in range(int(options["ntasks"])):
    output = open(options["output"].replace("%t", str(number)), "a")
    environment = {{**os.environ, "SLURM_PROCID": str(number)}}
    tasks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
for name in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(name, lambda number, frame: [task.send_signal(number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) printf 'localhost\\nlocalhost\\n' ;;
  *) echo "$*" >>"$FAKE_SLURM/scontrol" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the job, with options for training and variables."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    started = []

    def start(*options: str, **environ: object) -> subprocess.Popen[str]:
        job = str(10_000 + os.getpid() % 5_000 * 2 + len(started))
        environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "FAKE_SLURM": str(tmp_path),
            "OCTAVO_ROOT": str(ROOT),
            "OCTAVO_PYTHON": warm.python(),
            "LOG_FOLDER": str(tmp_path / "logs"),
            "SLURM_JOB_ID": job,
            "SLURM_JOB_NODELIST": "localhost,localhost",
            "SLURM_JOB_NUM_NODES": "2",
            "NGPU": "1",
            "GPUS": "0",
            "MIN_FREE_GB": "0",
            "DUMP_FOLDER": str(tmp_path / "out"),
            "CONFIG_FILE": "debug_model.toml",
            **{key: str(value) for key, value in environ.items()},
        }
        process = subprocess.Popen(
            ["bash", str(ROOT / "scripts/slurm/train.sbatch"), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def requeued(folder: Path) -> list[str]:
    calls = folder / "scontrol"
    return calls.read_text().splitlines() if calls.exists() else []


def test_a_job_on_two_machines_saves_before_its_time_is_over_and_goes_on(slurm, tmp_path):
    job = {
        "job.dump_folder": tmp_path / "out",
        "training.dataset": launching.small_corpus(),
        **launching.TINY,
        **launching.shallow(2),
        "checkpoint.enable": "true",
        "checkpoint.interval": 10_000,
    }

    def start(steps: int, **environ: object) -> subprocess.Popen[str]:
        flags = {**job, "training.steps": steps}
        return slurm(*(f"--{key}={value}" for key, value in flags.items()), **environ)

    def logs() -> str:
        return "".join(path.read_text() for path in sorted((tmp_path / "logs").iterdir()))

    first = start(10**6)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for("a report or an end", lambda: metrics.exists() or first.poll() is not None)
    assert first.poll() is None, (first.communicate(), logs())
    first.send_signal(signal.SIGUSR1)
    out, _ = first.communicate(timeout=LIMIT)
    assert first.returncode == 75, (out, logs())
    assert "octavo: SIGUSR1; the machines save and stop" in out
    (call,) = requeued(tmp_path)
    assert call.startswith("requeue 1")
    for number in range(2):
        log = (tmp_path / "logs" / f"node-{number}.log").read_text()
        assert " is fit: 0 GPUs" in log
        assert "SIGUSR1: training stops after this step" in log
    assert "octavo: 2 processes reach each other by gloo" in logs()

    done = len(metrics.read_text().splitlines())
    again = start(done + 1, SLURM_RESTART_COUNT=1, CHECK_NETWORK=0)
    out, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, (out, logs())
    assert f"resumed step {done}, " in logs()
    assert len(metrics.read_text().splitlines()) == done + 1
    assert len(requeued(tmp_path)) == 1


@pytest.mark.parametrize(
    ("command", "starts", "code"),
    [("false", 3, 1), ("test -d /nowhere -o", 1, 2), ("true", 1, 0)],
)
def test_what_may_pass_is_started_again_and_what_would_come_again_is_not(
    slurm, tmp_path, command, starts, code
):
    job = slurm(FAKE_COMMAND=command, MAX_RESTARTS=2)
    out, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == code, out
    assert out.count("octavo: start ") == starts
    assert requeued(tmp_path) == []


@pytest.mark.parametrize(
    ("sent", "code", "again"),
    [
        (signal.SIGUSR1, 1, True),  # a rank died in the save
        (signal.SIGUSR1, 137, True),
        (signal.SIGUSR1, 138, False),  # a run without checkpoints
        (signal.SIGUSR1, 4, False),
        (signal.SIGTERM, 75, False),  # cancelled
    ],
)
def test_what_is_requeued_after_a_signal(slurm, tmp_path, sent, code, again):
    script = tmp_path / "saves.sh"
    script.write_text(f"trap 'exit {code}' USR1\necho ready\nfor _ in {{1..9999}}; do sleep 0.1; done\n")
    job = slurm(FAKE_COMMAND=f"bash {script}")
    logs = [tmp_path / "logs" / f"node-{number}.log" for number in range(2)]
    for log in logs:
        wait_for_text(log, "ready")
    job.send_signal(sent)
    out, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == code, out
    assert bool(requeued(tmp_path)) == again
