"""Progress of a long pass over files: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from types import TracebackType

from octavo.core.format import format_clock

_BAR = 30
_SECONDS_PER_LINE = 10.0
_SECONDS_PER_BAR = 0.2


class FileProgress:
    """Prints to stderr the share of `sizes`, the bytes of the files in order, that is done.

    Compressed and parquet files count when they are complete: the position within them is not known.
    """

    def __init__(self, sizes: Sequence[int], workers: int) -> None:
        self._before = [0, *accumulate(sizes)]
        self._workers = workers
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._initial: tuple[float, int] | None = None
        self._line = ""

    def __enter__(self) -> FileProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and self._line:
            print(file=sys.stderr)

    def show(self, file: int, offset: int, tokens: int, bad: int) -> None:
        """Report `offset` bytes of file number `file` as done (-1: unknown), and `tokens` as written."""
        now = time.monotonic()
        total = self._before[-1] or 1
        done = min(self._before[file] + max(0, offset), self._before[file + 1])
        if self._initial is None:  # rates do not count what an interrupted run did before
            self._initial = (done / total, tokens)
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
        assert self._initial is not None
        first_share, first_tokens = self._initial
        bar = ""
        if self._terminal:
            filled = round(share * _BAR)
            bar = f"[{'=' * filled}{' ' * (_BAR - filled)}] "
        left = ""
        if share > first_share:
            rest = seconds * (1 - share) / (share - first_share)
            left = f", {format_clock(rest)} left"
        skipped = f", {bad:,} bad records" if bad else ""
        rate = (tokens - first_tokens) / seconds if seconds else 0.0
        plural = "es" if self._workers > 1 else ""
        return (
            f"{bar}{share:.0%}, {tokens:,} tokens, {rate:,.0f} per second on {self._workers} process{plural}"
            f"{left}{skipped}"
        )
