"""Start the runs of a comparison, several side by side, and go on with those that were interrupted.

Each run is a process of its own, the trainer's launcher, so what holds for a run holds here: it saves when it
is asked to stop, and goes on exactly where its checkpoint is. A comparison adds one file to a run's folder
when that run is over; so whatever was killed, and when, the same command finds out what is left to do. A
launcher whose comparison was killed is asked to stop by the kernel (Linux); where one is still at work, its
folder is waited for.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from octavo.commands.compare.report.run_data import SAVED_FILE
from octavo.commands.compare.runs import CHECKPOINTS, Plan, Run
from octavo.commands.compare.runs_progress import RunsProgress
from octavo.core import exit_codes
from octavo.core.file_lock import open_lock, try_lock
from octavo.core.fs import write_file
from octavo.train.run_dir import LOCK

FINISHED_FILE = "finished.json"
LOG_FILE = "log.txt"

_LOOKS_EVERY = 0.2
_OVER = {exit_codes.DONE: "done", exit_codes.BAD_NUMBERS: "ended because its numbers were not finite"}
"""Exit codes that are a result, and how it is told: a run that ends for its numbers would end so again."""

_PR_SET_PDEATHSIG = 1


@dataclass
class _Active:
    run: Run
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    enough: bool = False
    """Whether it was stopped for having done its steps, and so is over."""
    told: int = 0
    """How many of the signals that came were passed on to it."""


class Executor:
    """Runs what is left of `plan`, `jobs` at a time."""

    def __init__(self, plan: Plan, *, jobs: int, keep_checkpoints: bool):
        self._plan, self._jobs, self._keep = plan, jobs, keep_checkpoints
        self._active: list[_Active] = []
        self._waiting_for: set[str] = set()
        self._asked: list[int] = []
        self._code = exit_codes.DONE

    def __call__(self) -> int:
        """Run; returns 0 when all is over, 75 after a signal, or the exit code of a run that failed."""
        left = [run for run in self._plan.runs if not is_over(self._plan.folder(run))]
        for run in self._plan.runs:
            if run not in left:
                self._clean(run)
        with ExitStack() as stack:
            stack.callback(self._end)
            for number in exit_codes.STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    stack.callback(signal.signal, number, signal.signal(number, self._ask))
            progress = RunsProgress(self._plan)
            stack.callback(progress.close)
            progress.begin(left)
            while self._active or (left and not self._asked and self._code == exit_codes.DONE):
                while len(self._active) < self._jobs and not self._asked and self._code == exit_codes.DONE:
                    free = next((run for run in left if self._free(run, progress.say)), None)
                    if free is None:
                        break
                    left.remove(free)
                    self._active.append(self._start(free))
                    progress.say(f"{free.name}: {'starts' if progress.step(free) == 0 else 'goes on'}")
                for active in [one for one in self._active if one.process.poll() is not None]:
                    self._active.remove(active)
                    self._take(active, progress)
                self._pass_on()
                self._stop_the_control(progress)
                progress.show([active.run for active in self._active])
                time.sleep(_LOOKS_EVERY)
        if self._asked:
            return exit_codes.REQUEUE
        return self._code

    def _free(self, run: Run, say: Callable[[str], None]) -> bool:
        """Whether nobody is at work in the folder of `run`, as a process of an interrupted start may be."""
        path = self._plan.folder(run) / LOCK
        if not path.exists():
            return True
        with open_lock(path) as file:
            if try_lock(file):
                return True
        if run.name not in self._waiting_for:
            self._waiting_for.add(run.name)
            say(f"{run.name}: a process of an earlier start is still at work there; waiting for it to end")
        return False

    def _start(self, run: Run) -> _Active:
        folder = self._plan.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / LOG_FILE).open("ab")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.launch", *self._plan.flags(run)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment_of(self._plan),
            start_new_session=True,  # a terminal's Ctrl-C comes here, and is passed on once
            preexec_fn=_end_with(os.getpid()),
        )
        return _Active(run, process, log)

    def _stop_the_control(self, progress: RunsProgress) -> None:
        for active in self._active:
            steps = self._plan.steps_of(active.run)
            if steps < self._plan.steps and not active.enough and progress.step(active.run) >= steps:
                active.enough = True
                active.process.send_signal(signal.SIGTERM)

    def _take(self, active: _Active, progress: RunsProgress) -> None:
        """A run's process has ended: remember how."""
        active.log.close()
        code, run = active.process.returncode, active.run
        folder = self._plan.folder(run)
        code = code if code >= 0 else exit_codes.of_signal(-code)
        if code == exit_codes.REQUEUE and active.enough:
            code = exit_codes.DONE
        if code in _OVER:
            _write_over(folder, code)
            self._clean(run)
            progress.over(run, _OVER[code])
            return
        if self._asked or code == exit_codes.REQUEUE:
            progress.say(f"{run.name}: stopped after step {progress.step(run)}")
        else:
            progress.say(
                f"{run.name}: ended with exit code {code}; the end of {folder / LOG_FILE}:\n{_tail(folder)}"
            )
        self._code = code

    def _clean(self, run: Run) -> None:
        if not self._keep:
            shutil.rmtree(self._plan.folder(run) / CHECKPOINTS, ignore_errors=True)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def _pass_on(self) -> None:
        """Not from the handler: a run that was just being started is told too, and each is told once."""
        for active in self._active:
            for number in self._asked[active.told :]:
                active.process.send_signal(number)
                active.told += 1

    def _end(self) -> None:
        """Leave no process behind, whatever was raised."""
        for active in self._active:
            active.process.terminate()
        for active in self._active:
            active.process.wait()


def is_over(folder: Path) -> bool:
    """Whether a comparison's run in `folder` is over, well or not."""
    return (folder / FINISHED_FILE).exists()


def exit_code(folder: Path) -> int | None:
    """How the run in `folder` ended; None where it is not known to have."""
    try:
        return int(json.loads((folder / FINISHED_FILE).read_text())["exit_code"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write_over(folder: Path, code: int) -> None:
    write_file(folder / FINISHED_FILE, json.dumps({"exit_code": code}) + "\n")


def measure_saved(plan: Plan) -> bool:
    """Measure what the models of finished runs keep for backward, once; whether that could be done."""
    wanted = [plan.folder(run) for run in plan.runs if run.kind in ("baseline", "recipe")]
    if all((folder / SAVED_FILE).exists() for folder in wanted):
        return True
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "octavo.commands.compare.activation_memory", str(plan.out)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment_of(plan),
        check=False,
    )
    return ended.returncode == 0


def environment_of(plan: Plan) -> dict[str, str]:
    """The variables of a run's process."""
    environment = dict(os.environ)
    if plan.threads is not None:
        environment["OMP_NUM_THREADS"] = str(plan.threads)
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").exists():  # not installed, or in place: the runs take the same code
        paths = [str(checkout), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _end_with(parent: int) -> Callable[[], None] | None:
    """What makes a child be sent SIGTERM when `parent` has gone; None where the system can't."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _tail(folder: Path, lines: int = 12) -> str:
    written = (folder / LOG_FILE).read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in written[-lines:])
