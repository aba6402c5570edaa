"""Ends a process that hangs, and records the step and the stacks of processes that hang or die.

Collectives have timeouts (gloo raises, NCCL aborts), which end the processes that wait for a hung one. The
watchdog ends the hung process itself. A timer in C, which works without the GIL, is reset at each sign of
progress (a microbatch, an update); when it expires, it writes all stacks and ends the process. On SIGUSR2,
which the launcher sends to the remaining processes when one has died, the stacks are written and the process
continues. A reset takes about 30 microseconds.

In a pipeline the timer also ends the waiting processes, because torch's sends and receives between stages
have no timeout. The launcher announces a pipeline by an environment variable.

On Linux a process is killed together with its launcher, since otherwise it would keep its GPU.

A single process has no timer, because no other process waits for it.
"""

import ctypes
import faulthandler
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import IO

import torch.distributed as dist

from octavo.core.environment import LAUNCHER_VARIABLE, STATUS_VARIABLE
from octavo.launch.status import (
    StatusFile,
    asked_to_stop,
    stacks_path,
)
from octavo.launch.supervisor import PIPELINE_VARIABLE

_LATER = 10.0  # seconds; processes waiting in a collective time out first, with a message
_LATER_IN_A_PIPELINE = 1.0  # there they wait in a receive, which has no timeout
_STANDARD_ERROR = 2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_open_till_the_end: list[IO[str]] = []  # faulthandler holds only the file descriptor


class Watchdog:
    """Watches this process. Stacks go to the launcher's folder, or without a launcher to standard error."""

    def __init__(self) -> None:
        self._status: StatusFile | None = None
        self._stacks: IO[str] | None = None
        self._seconds: float | None = None
        self._timed = False
        self._later = _LATER_IN_A_PIPELINE if os.environ.get(PIPELINE_VARIABLE) else _LATER
        self._follows = False
        self.step = 0
        self.asked_to_stop: int | None = None
        """A stop signal that the launcher received before this process started."""

    def __enter__(self) -> "Watchdog":
        folder = os.environ.get(STATUS_VARIABLE)
        rank = int(os.environ.get("RANK", "0"))
        self._timed = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if folder:
            _end_with_the_launcher()
            self._stacks = stacks_path(Path(folder), rank).open("w")
            _open_till_the_end.append(self._stacks)
        faulthandler.enable(self._file, all_threads=True)
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        if folder:  # after the handler is set: a process with a status may be sent SIGUSR2
            self._status = StatusFile(Path(folder), rank)
            self._status.write(0)
            self.asked_to_stop = asked_to_stop(Path(folder))
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        if self._status is not None:
            self._status.write(self.step, ended=True, follows=self._follows)

    @property
    def _file(self) -> IO[str] | int:
        return _STANDARD_ERROR if self._stacks is None else self._stacks

    def begin(self, step: int, seconds: float) -> None:
        """Start `step`; from now on at most `seconds` may pass between signs of progress."""
        self.step, self._seconds = step, seconds
        if self._status is not None:
            self._status.write(step)
        self.progress()

    def progress(self) -> None:
        """Reset the timer."""
        if self._timed and self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds + self._later, exit=True, file=self._file)

    def pause(self) -> None:
        """Stop the timer for a long operation (a save, a validation); the next `progress` restarts it."""
        faulthandler.cancel_dump_traceback_later()

    def explain(self, error: BaseException) -> str | None:
        """A message for an error that another process caused, else None.

        The traceback goes to the file of stacks, because it shows where this process waited.
        """
        if not _lost_a_peer(error):
            return None
        self._follows = True
        if self._stacks is not None:
            traceback.print_exception(error, file=self._stacks)
            self._stacks.flush()
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        text = re.sub(r"^\[[^]]*\] ", "", text).partition(" This is typically")[
            0
        ]  # without gloo's file name and advice
        slow = "timed out" in text.lower()
        return (
            f"Step {self.step}: a collective {'timed out' if slow else 'broke off'}, since another process "
            f"{'hangs or has died' if slow else 'has ended'}: {text[:300]}"
        )


def _end_with_the_launcher() -> None:
    """Let the kernel kill this process when its launcher dies."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)


def _lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed. NCCL's errors have a type; gloo's contain the name of its source file."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
