"""A pipeline schedule written by hand: what each process does, action by action, in a CSV file.

    0F0,0F1,0B0,0B1        process 0: forward of stage 0 for microbatch 0, for microbatch 1, then backward
    1F0,1B0,1F1,1B1        process 1

One row per process, one action per cell: stage, F, B, I or W, microbatch. B is the whole backward pass; I is
its part for the stage's input, and W its part for the weights, which may come any time later. An empty cell
is idle. Sends, receives and gathers are left out. These are torch's "compute only" files.

torch asserts some of the rules and hangs on the others. So the schedule is simulated here before anything
starts.
"""

import csv
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.core.errors import ConfigError

_ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})")


@dataclass(frozen=True)
class ScheduleAction:
    """One cell. kind: F, B, I or W."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def read(path: Path) -> list[list[ScheduleAction]]:
    """The actions of each process, in order. `ConfigError` where a cell is none; `OSError` from the disk."""
    rows = []
    try:
        with path.open(newline="") as file:
            for number, cells in enumerate(csv.reader(file), 1):
                rows.append([_action(cell, path, number) for cell in cells if cell.strip()])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no CSV file: {error}") from None
    return rows


def _action(cell: str, path: Path, row: int) -> ScheduleAction:
    found = _ACTION.fullmatch(cell.strip())
    if found is None:
        raise ConfigError(
            f"{path}, row {row}: {cell.strip()[:40]!r} is no action; one is written as stage, F, B, I or W, "
            "microbatch, such as 0F0, and sends, receives and gathers are left out"
        )
    return ScheduleAction(int(found[1]), found[2], int(found[3]))


def processes(rows: Sequence[Sequence[ScheduleAction]]) -> tuple[int, ...]:
    """Stage -> the process that has it; of rows without a `problem`."""
    owner = {action.stage: process for process, row in enumerate(rows) for action in row}
    return tuple(owner[stage] for stage in sorted(owner))


def problem(rows: Sequence[Sequence[ScheduleAction]], degree: int, microbatches: int) -> str | None:
    """What is wrong with a schedule for `degree` processes and so many microbatches; None if it runs."""
    if len(rows) != degree:
        return f"has {len(rows)} rows, and there are {degree} processes (pipeline_parallel_degree)"
    owners: dict[int, set[int]] = {}
    for process, row in enumerate(rows):
        for action in row:
            owners.setdefault(action.stage, set()).add(process)
    stages = len(owners)
    if not stages or sorted(owners) != list(range(stages)):
        return f"has the stages {sorted(owners)}; they must be numbered from 0 without a gap"
    for stage, where in owners.items():
        if len(where) > 1:
            return f"has stage {stage} in rows {', '.join(str(w + 1) for w in sorted(where))}; one has it"
    if idle := [process + 1 for process, row in enumerate(rows) if not row]:
        return f"has nothing to do in row {idle[0]}"
    return _miscounted(rows, stages, microbatches) or _stuck(rows, stages)


def _miscounted(rows: Sequence[Sequence[ScheduleAction]], stages: int, microbatches: int) -> str | None:
    """Each stage takes each microbatch forward once, and backward once, whole or in two parts."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        for action in row:
            kinds.setdefault((action.stage, action.microbatch), []).append(action.kind)
    if (most := max(microbatch for _, microbatch in kinds)) >= microbatches:
        terms = "local_batch_size / pipeline_parallel_microbatch_size"
        return f"has a microbatch {most}, and {terms} = {microbatches}"
    for stage, microbatch in itertools.product(range(stages), range(microbatches)):
        done = "".join(kinds.get((stage, microbatch), []))
        if done not in ("FB", "FIW"):
            return (
                f"does {', '.join(done) or 'nothing'} with microbatch {microbatch} in stage {stage}; it must "
                "be F, then B, or F, then I, then W, each once"
            )
    last = [action.microbatch for row in rows for action in row if action == _forward(stages - 1, action)]
    if last != sorted(last):
        return "takes the microbatches through the last stage out of order, where torch counts their losses"
    return None


def _forward(stage: int, like: ScheduleAction) -> ScheduleAction:
    return ScheduleAction(stage, "F", like.microbatch)


def _stuck(rows: Sequence[Sequence[ScheduleAction]], stages: int) -> str | None:
    """Play the schedule: an action waits for the stage before it, or behind it, to hand something over."""
    done: set[ScheduleAction] = set()
    at = [0] * len(rows)
    moved = True
    while moved:
        moved = False
        for process, row in enumerate(rows):
            while at[process] < len(row) and _ready(row[at[process]], done, stages):
                done.add(row[at[process]])
                at[process] += 1
                moved = True
    waiting = [
        f"{row[i]} in row {p + 1}" for p, (i, row) in enumerate(zip(at, rows, strict=True)) if i < len(row)
    ]
    return f"deadlocks: {' and '.join(waiting)} wait for each other" if waiting else None


def _ready(action: ScheduleAction, done: set[ScheduleAction], stages: int) -> bool:
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return stage == 0 or ScheduleAction(stage - 1, "F", microbatch) in done
    if action.kind == "W":
        return ScheduleAction(stage, "I", microbatch) in done
    if ScheduleAction(stage, "F", microbatch) not in done:
        return False
    return stage == stages - 1 or any(ScheduleAction(stage + 1, kind, microbatch) in done for kind in "BI")
