"""Two launchers on one machine, as on two: they meet, train, stop together, and tell of each other's end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.launch import status
from tests.helpers import launching, ranks, warm
from tests.helpers.waiting import LIMIT, wait_for

SAVES = {**launching.shallow(2), "checkpoint.enable": "true", "checkpoint.interval": 2}


class Machines:
    """Two launchers, and what they write under `folder`."""

    def __init__(
        self, folder: Path, flags: dict[str, object], *, ordered: bool, processes: int, python: str
    ) -> None:
        self.folder, self.temporary = folder, [folder / f"tmp{number}" for number in range(2)]
        merged = {
            "job.dump_folder": folder,
            "training.dataset": launching.small_corpus(),
            **launching.TINY,
            **flags,
        }
        common = {
            "NNODES": "2",
            "NGPU": str(processes),
            "RDZV_ENDPOINT": f"localhost:{ranks.free_port()}",
            "CONFIG_FILE": "debug_model.toml",
            "LOG_RANK": ",".join(map(str, range(processes))),
        }
        self.launchers = []
        for number, temporary in enumerate(self.temporary):
            temporary.mkdir(parents=True, exist_ok=True)
            own = {"TMPDIR": str(temporary), **({"NODE_RANK": str(number)} if ordered else {})}
            self.launchers.append(
                subprocess.Popen(
                    [python, "-m", "octavo.launch", *(f"--{k}={v}" for k, v in merged.items())],
                    env={**os.environ, **common, **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def processes(self, number: int) -> list[status.Status]:
        """The training processes of one machine that have begun."""
        logs = list(self.temporary[number].glob("octavo-logs-*"))
        return status.read_all(logs[0]) if logs else []

    def wait_for_step(self, step: int) -> None:
        """Until a report of `step` is written."""
        metrics = self.folder / "metrics.jsonl"

        def there() -> bool:
            assert all(launcher.poll() is None for launcher in self.launchers), self.end()
            return metrics.exists() and len(metrics.read_text().splitlines()) >= step

        wait_for(f"a report of step {step}", there)

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes and standard errors; who does not end by himself is killed in the end."""
        codes, errs = [], []
        for launcher in self.launchers:
            try:
                _, err = launcher.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                launcher.kill()
                _, err = launcher.communicate()
            codes.append(launcher.returncode)
            errs.append(err)
        return codes, errs


@pytest.fixture
def start(tmp_path):
    begun = []

    def start(flags, *, ordered=True, processes=1, python=None) -> Machines:
        python = python or warm.python()
        begun.append(Machines(tmp_path, flags, ordered=ordered, processes=processes, python=python))
        return begun[-1]

    yield start
    for machines in begun:
        for launcher in machines.launchers:
            if launcher.poll() is None:
                launcher.kill()
            launcher.communicate()


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def stopped_and_resumed(start, tmp_path, *, processes: int) -> None:
    first = start({**SAVES, "training.steps": 10**6}, ordered=False, processes=processes)
    first.wait_for_step(2)
    first.launchers[1].send_signal(signal.SIGUSR1)
    codes, errs = first.end()
    assert codes == [75, 75], errs
    assert "Stopped by SIGUSR1 on rank" in "".join(errs)
    done = len(losses(tmp_path))
    assert (tmp_path / "checkpoint" / f"step-{done}").is_dir()

    second = start({**SAVES, "training.steps": done + 2}, processes=processes)
    codes, errs = second.end()
    assert codes == [0, 0], errs
    assert f"resumed step {done}, " in errs[0]
    assert "RNG exact" in errs[0]
    flags = {**launching.shallow(2), "training.steps": done + 2}
    whole = launching.train(tmp_path / "whole", flags, world=2 * processes)
    assert losses(tmp_path) == [(x["step"], x["loss"], x["grad_norm"]) for x in whole.metrics]


def test_a_signal_on_one_machine_stops_both_after_a_save_and_they_go_on(start, tmp_path):
    stopped_and_resumed(start, tmp_path, processes=1)


@pytest.mark.slow
def test_two_processes_on_each_of_two_machines(start, tmp_path):
    stopped_and_resumed(start, tmp_path, processes=2)


KILLED = {
    # who is killed -> what the other launcher says of the cause
    "launcher 0": "machine {host} (rank 0): the launcher is gone",
    "launcher 1": "machine {host} (rank 1): the launcher is gone",
    "rank 0": "rank 0 ",
    "rank 1": "rank 1 ",
}


@pytest.mark.parametrize(
    "killed", [pytest.param(who, marks=[] if who == "launcher 0" else [pytest.mark.slow]) for who in KILLED]
)
def test_who_is_killed_on_one_machine_is_named_on_the_other(start, killed):
    # No process ends because a collective has waited for too long, so its launcher must end it; a stand-in's
    # are not the launcher's own, and do not end with it.
    flags = {**SAVES, "training.steps": 10**6, "comm.train_timeout_seconds": 10**4}
    machines = start(flags, python=sys.executable)
    machines.wait_for_step(2)
    what, number = killed.split()
    there = machines.processes(int(number))
    pid = machines.launchers[int(number)].pid if what == "launcher" else there[0].pid
    os.kill(pid, signal.SIGKILL)
    codes, errs = machines.end()

    other = 1 - int(number)
    assert codes[other] == 1, errs
    host = os.uname().nodename
    cause = KILLED[killed].format(host=host)
    # A launcher reports its ranks every half second; one that dies before that is named without them.
    seen = errs[other].replace(
        f"machine {host}: the launcher", f"machine {host} (rank {number}): the launcher"
    )
    assert f"octavo: the job ends because of another machine: {cause}" in seen, errs
    assert "Traceback" not in errs[other], errs
    if what == "rank":
        assert codes[int(number)] == 128 + signal.SIGKILL
        assert f"octavo: {killed} ended with signal 9" in errs[int(number)]
    assert not any(alive(one.pid) for one in there)
    assert not any(alive(one.pid) for one in machines.processes(other))
