"""The progress of a comparison's runs: a bar on a terminal, otherwise a line every half minute."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.commands.compare.runs import Plan, Run
from octavo.core.format import format_clock
from octavo.core.terminal import for_terminal

_BAR = 24
_SECONDS_PER_LINE = 30.0
_SECONDS_PER_BAR = 0.5
_TAIL = 8192  # bytes; a line of metrics has some 500


class RunsProgress:
    """Shows on stderr how many of a plan's steps are done."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._terminal = sys.stderr.isatty()
        self._shown = self._start = time.monotonic()
        self._before = 0  # steps that were done at the start
        self._total = sum(plan.steps_of(run) for run in plan.runs)
        self._line = ""

    def begin(self, unfinished: Sequence[Run]) -> None:
        """Print what is to be done."""
        self._before = self._done()
        runs = len(self._plan.runs)
        finished = f"; {runs - len(unfinished)} already finished" if len(unfinished) < runs else ""
        self.print(f"{runs} runs, {self._total} steps in total, in {self._plan.out}{finished}")

    def step(self, run: Run) -> int:
        """The last step that `run` has reported."""
        return int(last_report(self._plan.folder(run)).get("step", 0))

    def print(self, text: str) -> None:
        """Print a line, in place of the bar."""
        if self._line:
            print("\r\033[K", end="", file=sys.stderr)
            self._line = ""
        print(for_terminal(f"octavo compare: {text}"), file=sys.stderr, flush=True)

    def finish(self, run: Run, result: str) -> None:
        """Print the result of `run`."""
        last = last_report(self._plan.folder(run))
        self.print(f"{run.name}: {result}, step {last.get('step', 0)}, loss {_loss(last)}")

    def show(self, active: Sequence[Run]) -> None:
        """Update the bar or print a line, if it is time to."""
        now = time.monotonic()
        if now - self._shown < (_SECONDS_PER_BAR if self._terminal else _SECONDS_PER_LINE):
            return
        self._shown = now
        done, total = self._done(), self._total
        left = ""
        if done > self._before:
            seconds = (now - self._start) * (total - done) / (done - self._before)
            left = f", {format_clock(seconds)} left"
        reports = {run.name: last_report(self._plan.folder(run)) for run in active}
        runs = ", ".join(f"{name} {last.get('step', 0)} ({_loss(last)})" for name, last in reports.items())
        text = f"{done / total:.0%} of {total:,} steps{left}: {runs}"
        if not self._terminal:
            self.print(text)
            return
        filled = round(done / total * _BAR)
        self._line = f"[{'=' * filled}{' ' * (_BAR - filled)}] {text}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{self._line[:width]}\033[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Move a terminal's cursor to a new line."""
        if self._line:
            print(file=sys.stderr)
            self._line = ""

    def _done(self) -> int:
        return sum(min(self.step(run), self._plan.steps_of(run)) for run in self._plan.runs)


def last_report(folder: Path) -> dict[str, Any]:
    """The last complete line of a run's metrics that has a loss; empty if there is none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            report = json.loads(line)
        except ValueError:  # torn, or its beginning was not read
            continue
        if isinstance(report, dict) and "loss" in report:
            return report
    return {}


def _loss(report: dict[str, Any]) -> str:
    return "n/a" if report.get("loss") is None else f"{report['loss']:.4f}"
