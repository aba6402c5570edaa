"""Starts the runs of a comparison, several at a time, and resumes interrupted ones.

Each run is a separate process, the trainer's launcher, so it saves when it gets a signal and resumes exactly
from its checkpoint. When a run is finished, the comparison adds one file to its folder. So the same command
continues the comparison whenever it was killed. If a comparison is killed, the kernel sends its launchers a
SIGTERM (on Linux); the next start waits for launchers that still work in their folders.
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
from octavo.core.fs import open_append, write_file
from octavo.train.run_dir import LOCK

FINISHED_FILE = "finished.json"
LOG_FILE = "log.txt"

_POLL_SECONDS = 0.2
_RESULTS = {exit_codes.DONE: "done", exit_codes.BAD_NUMBERS: "ended because its numbers were not finite"}
"""Exit codes that are results, and their descriptions. A run with non-finite numbers would end so again."""

_PR_SET_PDEATHSIG = 1


@dataclass
class _RunProcess:
    run: Run
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    stopped_early: bool = False
    """Whether it was stopped because it has done enough steps, and so is finished."""
    signals_sent: int = 0
    """How many of the received signals were forwarded to it."""


class Executor:
    """Executes the unfinished runs of `plan`, `jobs` at a time."""

    def __init__(self, plan: Plan, *, jobs: int, keep_checkpoints: bool):
        self._plan, self._jobs, self._keep_checkpoints = plan, jobs, keep_checkpoints
        self._active: list[_RunProcess] = []
        self._waiting_for: set[str] = set()
        self._signals: list[int] = []
        self._code = exit_codes.DONE

    def __call__(self) -> int:
        """Returns 0 when all runs are finished, 75 after a signal, or the exit code of a run that failed."""
        waiting = [run for run in self._plan.runs if not is_finished(self._plan.folder(run))]
        for run in self._plan.runs:
            if run not in waiting:
                self._delete_checkpoints(run)
        with ExitStack() as stack:
            stack.callback(self._terminate_all)
            for number in exit_codes.STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            progress = RunsProgress(self._plan)
            stack.callback(progress.close)
            progress.begin(waiting)
            while self._active or (waiting and self._may_start()):
                while len(self._active) < self._jobs and self._may_start():
                    free = next((run for run in waiting if self._is_free(run, progress.print)), None)
                    if free is None:
                        break
                    waiting.remove(free)
                    self._active.append(self._start(free))
                    progress.print(f"{free.name}: {'resumes' if progress.step(free) else 'starts'}")
                for active in [one for one in self._active if one.process.poll() is not None]:
                    self._active.remove(active)
                    self._record_exit(active, progress)
                self._forward_signals()
                self._stop_control(progress)
                progress.show([active.run for active in self._active])
                time.sleep(_POLL_SECONDS)
        return exit_codes.REQUEUE if self._signals else self._code

    def _may_start(self) -> bool:
        return not self._signals and self._code == exit_codes.DONE

    def _is_free(self, run: Run, report: Callable[[str], None]) -> bool:
        """Whether no process, such as one of an interrupted start, works in the folder of `run`."""
        path = self._plan.folder(run) / LOCK
        if not path.exists():
            return True
        with open_lock(path) as file:
            if try_lock(file):
                return True
        if run.name not in self._waiting_for:
            self._waiting_for.add(run.name)
            report(f"{run.name}: a process of an earlier start still works there; waiting for it to end")
        return False

    def _start(self, run: Run) -> _RunProcess:
        folder = self._plan.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        log = open_append(folder / LOG_FILE)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.launch", *self._plan.flags(run)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment_of(self._plan),
            start_new_session=True,  # a terminal's Ctrl-C reaches this process only, which forwards it once
            preexec_fn=_terminate_with(os.getpid()),
        )
        return _RunProcess(run, process, log)

    def _stop_control(self, progress: RunsProgress) -> None:
        for active in self._active:
            steps = self._plan.steps_of(active.run)
            if steps < self._plan.steps and not active.stopped_early and progress.step(active.run) >= steps:
                active.stopped_early = True
                active.process.send_signal(signal.SIGTERM)

    def _record_exit(self, active: _RunProcess, progress: RunsProgress) -> None:
        active.log.close()
        code, run = active.process.returncode, active.run
        folder = self._plan.folder(run)
        code = code if code >= 0 else exit_codes.of_signal(-code)
        if code == exit_codes.REQUEUE and active.stopped_early:
            code = exit_codes.DONE
        if code in _RESULTS:
            write_file(folder / FINISHED_FILE, json.dumps({"exit_code": code}) + "\n")
            self._delete_checkpoints(run)
            progress.finish(run, _RESULTS[code])
            return
        if self._signals or code == exit_codes.REQUEUE:
            progress.print(f"{run.name}: stopped after step {progress.step(run)}")
        else:
            log = folder / LOG_FILE
            progress.print(f"{run.name}: ended with exit code {code}; the end of {log}:\n{_tail(log)}")
        self._code = code

    def _delete_checkpoints(self, run: Run) -> None:
        if not self._keep_checkpoints:
            shutil.rmtree(self._plan.folder(run) / CHECKPOINTS, ignore_errors=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _forward_signals(self) -> None:
        """Called from the loop, not the handler, so that a run that was just being started gets them too."""
        for active in self._active:
            for number in self._signals[active.signals_sent :]:
                active.process.send_signal(number)
                active.signals_sent += 1

    def _terminate_all(self) -> None:
        for active in self._active:
            active.process.terminate()
        for active in self._active:
            active.process.wait()


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has a result, good or bad."""
    return (folder / FINISHED_FILE).exists()


def exit_code(folder: Path) -> int | None:
    """The exit code of the finished run in `folder`; None if it is not known."""
    try:
        return int(json.loads((folder / FINISHED_FILE).read_text())["exit_code"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def measure_activation_memory(plan: Plan) -> bool:
    """Measure the activation memory of the finished runs, unless done before; returns False on failure."""
    folders = [plan.folder(run) for run in plan.runs if run.kind in ("baseline", "recipe")]
    if all((folder / SAVED_FILE).exists() for folder in folders):
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
    """The environment variables of a run's process."""
    environment = dict(os.environ)
    if plan.threads is not None:
        environment["OMP_NUM_THREADS"] = str(plan.threads)
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").exists():  # not an installed package: the runs use the same code
        paths = [str(checkout), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _terminate_with(parent: int) -> Callable[[], None] | None:
    """A `preexec_fn` that has the child get SIGTERM when process `parent` ends; None if not on Linux."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def prepare_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare_child


def _tail(log: Path, lines: int = 12) -> str:
    written = log.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in written[-lines:])
