"""The launcher's eye on the training processes of its machine, without torch.

torchrun, which starts them where there are several machines, passes a signal on and kills after half a minute
whatever is left, which tears a long save apart; and when one process dies it waits as long for others that
hang in a collective. So signals are taken here: the first one is passed to each process, once, and then the
launcher waits for as long as saving takes. And a thread looks every quarter of a second whether all processes
are there. When one has gone without saying so, the others write their stacks, get `GRACE` seconds to end by
themselves, and are killed. One that is stopped (SIGSTOP, a debugger) writes its stacks when it is continued,
which is just before it is killed: with more time it might end by itself, and nobody would be told who it was
that hung.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from octavo.core import exit_codes
from octavo.launch import status
from octavo.launch.status import Status

GRACE = 4.0
"""Seconds that the others have when a process has died: in gloo they notice it, in NCCL they may not."""

PIPELINE_VARIABLE = "OCTAVO_PIPELINE"
"""Set for processes that are stages of a pipeline: see `distributed/watchdog.py`."""

_LOOKS_EVERY = 0.25
_WRITES_WITHIN = 0.5  # seconds that a process needs for its stacks
_INSISTS_AFTER = 1.0  # seconds from the first signal; then a second Ctrl-C ends everything


class Supervisor:
    """Within `with`, signals are passed on and deaths are noticed. `folder` is the processes' status folder.

    deaths: the last words of processes that had gone, when first one had, without saying so.
    killed: the processes that were still there after the grace.
    ended_at_once: the signal of someone who did not wait for the save, if there was one.
    for_others: whether the processes were to end because of another machine.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._signalled: tuple[int, float] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="octavo-supervisor", daemon=True)
        self.deaths: list[Status] = []
        self.killed: list[Status] = []
        self.ended_at_once: int | None = None
        self.for_others = False

    def __enter__(self) -> "Supervisor":
        for number in exit_codes.STOPPING:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._pass_on)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def look(self) -> tuple[list[int], list[str]]:
        """The ranks of this machine, and what to tell other machines of those that died."""
        ranks = [process.rank for process in status.read_all(self._folder)]
        return ranks, [f"rank {one.rank} died {one.place}" for one in self.deaths if not self.for_others]

    def end_for_others(self) -> None:
        """Another machine is lost: the processes here are to end."""
        self.for_others = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not _has_children():
            raise SystemExit(exit_codes.of_signal(number))
        now = time.monotonic()
        if self._signalled is not None:
            if number == signal.SIGINT and now - self._signalled[1] >= _INSISTS_AFTER:
                _say("a second Ctrl-C: ending at once; checkpoints that were published are whole")
                self.ended_at_once = number
                for process in status.read_all(self._folder):
                    _kill_group(process.pid)
            return
        self._signalled = (number, now)
        _say(
            f"{signal.Signals(number).name}: training stops after this step"
            + ("; Ctrl-C again ends it at once" if number == signal.SIGINT else "")
        )
        status.ask_to_stop(self._folder, number)  # first: a process that starts now reads it
        for process in status.read_all(self._folder):
            _send(process.pid, number)

    def _watch(self) -> None:
        while not self._over.wait(_LOOKS_EVERY):
            processes = status.read_all(self._folder)
            # One that has lost a peer ends, for which it may need some seconds.
            gone = [process for process in processes if process.follows or not _exists(process.pid)]
            self.deaths = [process for process in gone if not process.ended]
            if self.for_others or self.deaths or (gone and len(gone) < len(processes)):
                self._end_the_others()
                return

    def _end_the_others(self) -> None:
        """Others than those that have gone. They may be about to end as well, so they have time for it."""
        if self._over.wait(2 * _LOOKS_EVERY):
            return
        for process in self._left():
            _send(process.pid, signal.SIGUSR2)
        end = time.monotonic() + GRACE
        while self._left() and time.monotonic() < end:
            if self._over.wait(_LOOKS_EVERY):
                return
        self.killed = self._left()
        for process in self.killed:
            _send(process.pid, signal.SIGCONT)
        self._over.wait(_WRITES_WITHIN)
        for process in self.killed:
            _kill_group(process.pid)

    def _left(self) -> list[Status]:
        """Processes that are at work: a process that has said that it ends needs no help with it."""
        return [one for one in status.read_all(self._folder) if not one.ended and _exists(one.pid)]


def _say(text: str) -> None:
    """Not by print: a signal may arrive within one."""
    os.write(sys.stderr.fileno(), f"octavo: {text}\n".encode())


def _has_children() -> bool:
    """Whether this process has started any that still exist; before, there is nobody to wait for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and whose parent has not looked yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, as on macOS
        return True


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_group(pid: int) -> None:
    """Each process was started in a session, and so a group, of its own."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
