"""Supervises the training processes of one machine, without torch: forwards signals, notices deaths.

torchrun, which starts the processes of several machines, kills what is left half a minute after a signal,
which cuts a long save short. When a process dies, it waits as long for others that hang in a collective. So
signals are handled here: the first is forwarded to each process once, and the launcher then waits for as long
as saving takes. A thread checks every quarter of a second whether all processes are alive. When one has died
without announcing it, the others write their Python stacks, get `GRACE` seconds to end by themselves, and are
killed. A stopped process (SIGSTOP, a debugger) writes its stacks when it is continued, just before it is
killed: with more time it might end by itself, and the report would not name it.

While the launcher waits for other machines, its main thread is inside the store's C++ code, where Python
handles no signal and the store's own limit may not hold. So the thread ends the launcher then, after a signal
or when the time is over.
"""

import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from octavo.core import exit_codes
from octavo.launch import status
from octavo.launch.status import Status, Statuses

GRACE = 4.0
"""Seconds that the others get when a process has died: under gloo they notice it, under NCCL they may not."""

PIPELINE_VARIABLE = "OCTAVO_PIPELINE"
"""Set for processes that are stages of a pipeline: see `train/watchdog.py`."""

_CHECK_EVERY = 0.25
_STUCK_AFTER = 1.0  # seconds in which the main thread has not handled a signal
_OVERTIME = 3.0  # seconds beyond the limit of a rendezvous, which should end it by itself
_STACKS_WITHIN = 0.5  # seconds that a process needs to write its stacks
_SECOND_SIGNAL_AFTER = 1.0  # seconds after the first signal, from when a second Ctrl-C kills


class Supervisor:
    """Forwards signals and notices deaths while its `with` block runs. `folder`: the processes' status
    folder. `meets_within`: seconds, if processes are only started once other machines are found.

    deaths: the last status of the processes that first died without announcing it.
    killed: the processes that were still running after the grace period.
    ended_at_once: the signal of a user who did not wait for the save, if any.
    for_another_machine: whether the processes must end because of another machine.
    """

    def __init__(self, folder: Path, meets_within: float | None = None):
        self._folder, self._statuses = folder, Statuses(folder)
        self._meets_within = meets_within
        self._unheard: tuple[int, float] | None = None
        self._wakeup: tuple[int, int] | None = None
        self._signalled: tuple[int, float] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="octavo-supervisor", daemon=True)
        self.deaths: list[Status] = []
        self.killed: list[Status] = []
        self.ended_at_once: int | None = None
        self.for_another_machine = False

    def __enter__(self) -> "Supervisor":
        for number in exit_codes.STOPPING:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._pass_on)
        if self._meets_within is not None:
            self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            for end in self._wakeup:
                os.close(end)

    def statuses(self) -> list[Status]:
        """The last status of each process."""
        return self._statuses.read()

    @property
    def signal(self) -> int | None:
        """The signal that was forwarded to the processes, if any."""
        return None if self._signalled is None else self._signalled[0]

    def snapshot(self) -> tuple[list[int], list[str]]:
        """The ranks of this machine, and a sentence for each that died, for the other machines."""
        ranks = [process.rank for process in self.statuses()]
        return ranks, [
            f"rank {one.rank} died {one.place}" for one in self.deaths if not self.for_another_machine
        ]

    def end_for_another_machine(self) -> None:
        """End the processes here, because another machine is lost."""
        self.for_another_machine = True

    def _end_if_stuck(self, waited: float) -> None:
        """End this process if its main thread, which waits for other machines, is stuck in the store."""
        assert self._wakeup is not None
        with suppress(BlockingIOError):
            for number in os.read(self._wakeup[0], 64):
                if number in exit_codes.STOPPING:
                    self._unheard = number, time.monotonic()
        code = None
        if self._unheard is not None and time.monotonic() - self._unheard[1] > _STUCK_AFTER:
            code = exit_codes.of_signal(self._unheard[0])
            reason = f"{signal.Signals(self._unheard[0]).name} while waiting for the other machines"
        elif self._meets_within is not None and waited > self._meets_within + _OVERTIME:
            code = exit_codes.FAILED
            reason = (
                f"the machines did not meet within {self._meets_within:g} s (RDZV_TIMEOUT): no answer from "
                "RDZV_ENDPOINT; another service may hold the port"
            )
        if code is not None and not _has_children():
            _print(reason)
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(code)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._unheard = None
        if not _has_children():
            raise SystemExit(exit_codes.of_signal(number))
        now = time.monotonic()
        if self._signalled is not None:
            if number == signal.SIGINT and now - self._signalled[1] >= _SECOND_SIGNAL_AFTER:
                _print("a second Ctrl-C: ending at once; checkpoints that were published are whole")
                self.ended_at_once = number
                for process in self.statuses():
                    _kill_group(process.pid)
            return
        self._signalled = (number, now)
        _print(
            f"{signal.Signals(number).name}: training stops after this step"
            + ("; Ctrl-C again ends it at once" if number == signal.SIGINT else "")
        )
        status.ask_to_stop(self._folder, number)  # first, for processes that are still starting
        for process in self.statuses():
            _send(process.pid, number)

    def _watch(self) -> None:
        began = time.monotonic()
        while not self._over.wait(_CHECK_EVERY):
            processes = self.statuses()
            if self._wakeup is not None and not processes:
                self._end_if_stuck(time.monotonic() - began)
            # A process that lost a peer ends by itself, which may take some seconds.
            gone = [process for process in processes if process.follows or not _exists(process.pid)]
            self.deaths = [process for process in gone if not process.ended]
            if self.for_another_machine or self.deaths or (gone and len(gone) < len(processes)):
                self._end_the_rest()
                return

    def _end_the_rest(self) -> None:
        """End the processes that are left, after time to end by themselves."""
        if self._over.wait(2 * _CHECK_EVERY):
            return
        for process in self._running():
            _send(process.pid, signal.SIGUSR2)
        end = time.monotonic() + GRACE
        while self._running() and time.monotonic() < end:
            if self._over.wait(_CHECK_EVERY):
                return
        self.killed = self._running()
        for process in self.killed:
            _send(process.pid, signal.SIGCONT)
        self._over.wait(_STACKS_WITHIN)
        for process in self.killed:
            _kill_group(process.pid)

    def _running(self) -> list[Status]:
        """The processes that run and have not announced their end."""
        return [one for one in self.statuses() if not one.ended and _exists(one.pid)]


def _print(text: str) -> None:
    """Write a line to standard error. `print` is not safe here: a signal may arrive during another print."""
    os.write(sys.stderr.fileno(), f"octavo: {text}\n".encode())


def _has_children() -> bool:
    """Whether this process has child processes."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _exists(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
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
    """Kill a training process and its children: each was started in a session, and so a group, of its own."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
