"""Status files, by which a training process reports to the launcher of its machine: no torch, no sockets.

    <folder>/rank3.status    pid, rank, state and step, in 64 bytes that are overwritten in place every step
    <folder>/rank3.stacks    Python stacks of all its threads, written on request and on a crash
    <folder>/stop            the signal that the launcher received, for processes that are still starting

The launcher makes the folder and names it in OCTAVO_STATUS; without that variable nothing is written. Files
outlive the process however it dies, and so show the step in which it died.
"""

import os
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from octavo.core.fs import write_file

_BYTES = 64


@dataclass(frozen=True)
class Status:
    """The last status of one process. step: the current one, 0 before the first. ended: the process announced
    its end. follows: it ended because another process had failed.
    """

    pid: int
    rank: int
    step: int
    ended: bool
    follows: bool = False

    @property
    def place(self) -> str:
        """Its position in the run."""
        return f"in step {self.step}" if self.step else "before its first step"

    def __str__(self) -> str:
        return f"rank {self.rank} {self.place}"


class StatusFile:
    """The status file of this process."""

    def __init__(self, folder: Path, rank: int):
        self._rank = rank
        self._file = os.open(folder / f"rank{rank}.status", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, step: int, *, ended: bool = False, follows: bool = False) -> None:
        """Record the step that this process is in; takes some microseconds."""
        line = f"{os.getpid()} {self._rank} {step} {int(ended) + int(follows)}"
        os.pwrite(self._file, line.encode().ljust(_BYTES - 1) + b"\n", 0)


class Statuses:
    """The status files in `folder`. They are kept open, so that they can be read even after someone has
    cleaned /tmp, where the folder is.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[Path, int] = {}

    def read(self) -> list[Status]:
        """The status of every process that has started, by rank."""
        for path in self._folder.glob("rank*.status"):
            if path not in self._open:
                with suppress(FileNotFoundError):
                    self._open[path] = os.open(path, os.O_RDONLY)
        found = []
        for file in self._open.values():
            words = os.pread(file, _BYTES, 0).split()
            if len(words) == 4:  # not a file that is being created
                pid, rank, step, ended = map(int, words)
                found.append(Status(pid, rank, step, ended > 0, ended > 1))
        return sorted(found, key=lambda status: status.rank)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def read_all(folder: Path) -> list[Status]:
    """The statuses in `folder`, read once."""
    with closing(Statuses(folder)) as statuses:
        return statuses.read()


def stacks_path(folder: Path, rank: int) -> Path:
    """Where rank `rank` writes its stacks."""
    return folder / f"rank{rank}.stacks"


def ask_to_stop(folder: Path, number: int) -> None:
    """Leave signal `number` for processes that are still starting."""
    with suppress(FileNotFoundError):  # the folder was deleted during a long run: none is starting
        write_file(folder / "stop", str(number))


def asked_to_stop(folder: Path) -> int | None:
    """The signal that was left for processes that are still starting, or None."""
    try:
        return int((folder / "stop").read_text())
    except FileNotFoundError:
        return None
