"""What a training process tells the launcher on its machine while it runs, in files: no torch, no sockets.

    <folder>/rank3.status    pid, rank, state and step, in 64 bytes that are overwritten in place every step
    <folder>/rank3.stacks    Python stacks of all its threads, written when asked for and on a crash
    <folder>/stop            a signal that the launcher was sent, for processes that are still starting

The launcher makes the folder and names it in OCTAVO_STATUS; without the variable nothing is written. Files
outlive the process however it dies, which is what tells the step in which it died.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from octavo.core.fs import write_file

_BYTES = 64


@dataclass(frozen=True)
class Status:
    """The last word of one process. step: the one it is in, 0 before the first. ended: it left by itself,
    and knew it. follows: it did so because another process had failed.
    """

    pid: int
    rank: int
    step: int
    ended: bool
    follows: bool = False

    @property
    def place(self) -> str:
        """Where in the run it is, or was."""
        return f"in step {self.step}" if self.step else "before its first step"

    def __str__(self) -> str:
        return f"rank {self.rank} {self.place}"


class StatusFile:
    """Written by the process that it is about."""

    def __init__(self, folder: Path, rank: int):
        self._rank = rank
        self._file = os.open(folder / f"rank{rank}.status", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, step: int, *, ended: bool = False, follows: bool = False) -> None:
        """Say which step this process is in; some microseconds."""
        line = f"{os.getpid()} {self._rank} {step} {int(ended) + int(follows)}"
        os.pwrite(self._file, line.encode().ljust(_BYTES - 1) + b"\n", 0)


def read_all(folder: Path) -> list[Status]:
    """The status of every process that has begun, by rank."""
    found = []
    for path in folder.glob("rank*.status"):
        words = path.read_text().split()
        if len(words) == 4:  # not one that is just being made
            pid, rank, step, ended = map(int, words)
            found.append(Status(pid, rank, step, ended > 0, ended > 1))
    return sorted(found, key=lambda status: status.rank)


def stacks_path(folder: Path, rank: int) -> Path:
    """Where rank `rank` writes its stacks."""
    return folder / f"rank{rank}.stacks"


def ask_to_stop(folder: Path, number: int) -> None:
    """Leave signal `number` for processes that cannot be sent it yet."""
    write_file(folder / "stop", str(number))


def asked_to_stop(folder: Path) -> int | None:
    """The signal that was left before this process could be sent it."""
    try:
        return int((folder / "stop").read_text())
    except FileNotFoundError:
        return None
