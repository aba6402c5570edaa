"""A process that hangs or dies leaves the step it was in and the stacks of its threads behind.

A collective has a timeout of its own (gloo raises, NCCL aborts), which catches a process that waits for
another. This here catches the other one. A timer in C, which needs no lock of Python's, is wound up at each
sign of progress (a microbatch, an update); if it runs down, it writes all stacks and ends the process. And on
SIGUSR2, which the launcher sends to those who are left when one has died, the stacks are written and the
process goes on. Winding up costs some 30 microseconds.

In a pipeline it catches both: torch's sends and receives between stages take no timeout, so nobody else would
end a stage that waits for another. The launcher says by a variable that there is one.

A process ends with its launcher, too, which Linux sees to: nobody else would look after it, and it would keep
its GPU.

Where a step of one process alone takes its time nobody waits, so a job of one process has no timer.
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

_LATER = 10.0  # seconds: those who wait in a collective for this process come first, and say so
_LATER_IN_A_PIPELINE = 1.0  # there they wait in a receive, which says nothing
_STANDARD_ERROR = 2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_open_till_the_end: list[IO[str]] = []  # faulthandler keeps a file's number, and writes whatever has it


class Watchdog:
    """Watches this process. Stacks go to the launcher's folder, or to standard error without a launcher."""

    def __init__(self) -> None:
        self._status: StatusFile | None = None
        self._stacks: IO[str] | None = None
        self._seconds: float | None = None
        self._timed = False
        self._later = _LATER_IN_A_PIPELINE if os.environ.get(PIPELINE_VARIABLE) else _LATER
        self._follows = False
        self.step = 0
        self.asked_to_stop: int | None = None
        """A signal that the launcher was sent before this process was there to be sent it."""

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
        if folder:  # after the handler stands: who has a status can be asked for stacks
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
        """Step `step` begins; from now on `seconds` may pass from one sign of progress to the next."""
        self.step, self._seconds = step, seconds
        if self._status is not None:
            self._status.write(step)
        self.progress()

    def progress(self) -> None:
        """A sign of progress: the timer starts anew."""
        if self._timed and self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds + self._later, exit=True, file=self._file)

    def pause(self) -> None:
        """What comes may take its time (a save, a validation); the next sign of progress ends the pause."""
        faulthandler.cancel_dump_traceback_later()

    def explain(self, error: BaseException) -> str | None:
        """One sentence for an error that another process caused; None for any other.

        The traceback then goes to the file of stacks, since it tells where this process waited.
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
        ]  # gloo's file, and its advice
        slow = "timed out" in text.lower()
        return (
            f"Step {self.step}: a collective {'timed out' if slow else 'broke off'}, since another process "
            f"{'hangs or has died' if slow else 'has ended'}: {text[:300]}"
        )


def _end_with_the_launcher() -> None:
    """From now on, if the launcher is killed this process is, too."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it was killed before that
        os.kill(os.getpid(), signal.SIGKILL)


def _lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed: NCCL's errors have a type, gloo's name the file that raises them."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
