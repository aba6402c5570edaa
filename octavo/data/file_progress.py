"""How far a long pass over files is: a bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from types import TracebackType

_BAR = 30
_SECONDS_PER_LINE = 10.0
_SECONDS_PER_BAR = 0.2


class FileProgress:
    """Shows the share of `sizes`, bytes of the files in order, that is done; on stderr.

    Within a compressed file or a parquet file the place is not known, and the share stands still.
    """

    def __init__(self, sizes: Sequence[int], workers: int) -> None:
        self._before = [0, *accumulate(sizes)]
        self._workers = workers
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._from: tuple[float, int] | None = None
        self._line = ""

    def __enter__(self) -> FileProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and self._line:
            print(file=sys.stderr)

    def show(self, file: int, offset: int, tokens: int, bad: int) -> None:
        """`offset` bytes of file number `file` are done (-1: not known), and `tokens` are written so far."""
        now = time.monotonic()
        total = self._before[-1] or 1
        done = min(self._before[file] + max(0, offset), self._before[file + 1])
        if self._from is None:  # of this run: what an interrupted one has done took no time here
            self._from = (done / total, tokens)
        every = _SECONDS_PER_BAR if self._terminal else _SECONDS_PER_LINE
        if now - self._shown < every:
            return
        self._shown = now
        self._line = self._text(done / total, tokens, bad, now - self._start)
        if self._terminal:
            print(f"\r{self._line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(self._line, file=sys.stderr, flush=True)

    def _text(self, share: float, tokens: int, bad: int, seconds: float) -> str:
        assert self._from is not None
        first_share, first_tokens = self._from
        bar = ""
        if self._terminal:
            filled = round(share * _BAR)
            bar = f"[{'=' * filled}{' ' * (_BAR - filled)}] "
        left = ""
        if share > first_share:
            rest = seconds * (1 - share) / (share - first_share)
            left = f", {_clock(rest)} left"
        passed = f", {bad:,} bad records" if bad else ""
        rate = (tokens - first_tokens) / seconds if seconds else 0.0
        plural = "es" if self._workers > 1 else ""
        return (
            f"{bar}{share:.0%}, {tokens:,} tokens, {rate:,.0f} a second on {self._workers} process{plural}"
            f"{left}{passed}"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
