"""Starts the training processes of one machine, echoes their output and waits for them. Free of torch, whose
import in the launcher would double the time to the first step.

Each process runs in a session, and so a process group, of its own. It writes to files in the launcher's
folder, laid out as torchrun's; the output of the shown ranks is echoed line by line. When one fails, the
others get SIGTERM; the `Supervisor` kills those that do not react.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from octavo.core import exit_codes
from octavo.core.environment import STORE_VARIABLE

_CHECK_EVERY = 0.1
_GRACE = 30.0

Failures = Mapping[int, tuple[int, int]]
"""Rank -> local rank, exit code; the first that failed comes first."""


def run(command: Sequence[str], processes: int, shown: Collection[int], logs: Path) -> Failures:
    """Run Python with the arguments `command` in `processes` processes, until all have ended.

    When one fails, the others get SIGTERM, and SIGKILL half a minute later. Returns those that failed.
    """
    signal.signal(signal.SIGQUIT, _exit_on_sigquit)
    folders = [logs / "none_local" / "attempt_0" / str(rank) for rank in range(processes)]
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True)
        try:
            for rank, folder in enumerate(folders):
                place = {"RANK": rank, "WORLD_SIZE": processes, STORE_VARIABLE: logs / "store"}
                started.append(_start(command, place, folder))
            echoes = [
                stack.enter_context(_EchoedLog(folders[rank] / name, f"[rank{rank}]:", to))
                for rank in sorted(shown)
                for name, to in (("stdout.log", sys.stdout), ("stderr.log", sys.stderr))
            ]
            failed = _wait(started, echoes)
        finally:
            _send_all(started, signal.SIGKILL)
            for process in started:
                process.wait()
    return {rank: (rank, code) for rank, code in failed.items()}


def _start(command: Sequence[str], place: Mapping[str, object], folder: Path) -> subprocess.Popen[bytes]:
    """Start one process; `place` holds its variables, as torchrun sets them."""
    own = {**place, "LOCAL_RANK": place["RANK"], "LOCAL_WORLD_SIZE": place["WORLD_SIZE"]}
    environ = {**os.environ, **{name: str(value) for name, value in own.items()}}
    environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    with (folder / "stdout.log").open("wb") as out, (folder / "stderr.log").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-u", *command], env=environ, stdout=out, stderr=err, start_new_session=True
        )


class _EchoedLog:
    """Copies what is appended to a file to a stream, line by line."""

    def __init__(self, path: Path, prefix: str, to: TextIO):
        self._file, self._prefix, self._to = path.open(errors="replace"), prefix, to
        self._rest = ""

    def __enter__(self) -> "_EchoedLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.echo()
        if self._rest:
            self._write([self._rest])
        self._file.close()

    def echo(self) -> None:
        """Copy the lines appended since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        if lines:
            self._write(lines)

    def _write(self, lines: list[str]) -> None:
        with suppress(OSError):  # the reader is gone; training continues
            self._to.write("".join(f"{self._prefix}{line}\n" for line in lines))
            self._to.flush()


def _wait(processes: Sequence[subprocess.Popen[bytes]], echoes: Sequence[_EchoedLog]) -> dict[int, int]:
    """Wait until all have ended, at most `_GRACE` seconds after the first failure. Returns the exit codes of
    those that failed, first failure first.
    """
    failed: dict[int, int] = {}
    end = math.inf
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        for show in echoes:
            show.echo()
        failed |= {rank: code for rank, code in enumerate(codes) if code and rank not in failed}
        if None not in codes:
            break
        if failed and end == math.inf:
            _send_all(processes, signal.SIGTERM)
            end = time.monotonic() + _GRACE
        time.sleep(_CHECK_EVERY)
    return failed


def _send_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _exit_on_sigquit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(exit_codes.of_signal(number))
