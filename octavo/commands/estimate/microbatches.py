"""A pipeline's many microbatches, told from a few.

In a pipeline one microbatch is like another: its forward leaves R bytes until its backward, and that leaves C
bytes until the step ends (a received activation's gradient, a loss). So what is held at a moment is what was
held at the same moment of a shorter schedule, plus R for each microbatch more in flight, plus C for each one
more that is done. R and C are seen in the short schedule itself, where one microbatch's pieces differ from
the next one's by just that; where they do not differ by the same everywhere, all microbatches are traced.

A process of the schedules 1F1B and GPipe does F^w (B F)^n B^w, with w + n microbatches. What is traced is the
same with a smaller w and n. Kept are: the first microbatch, which gathers weights and makes gradients; the
last one, which reduces them; and as many in between as it takes to see R, C and what a microbatch calls.
Received and sent buffers are those of all microbatches. Other schedules are traced whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.commands.estimate.memory_tracker import BACKWARD, FORWARD, Action, Log, MemoryTracker, Place
from octavo.commands.estimate.operations import Counts, Noted
from octavo.config.pipeline_plan import PipelinePlan

_Held = dict[str, int]


class NotAlike(Exception):
    """A microbatch is not like the one before it."""


@dataclass(frozen=True)
class Fewer:
    """F^warmup (B F)^steady B^warmup: what is traced. more_warmup, more_steady: what is left out."""

    warmup: int
    steady: int
    more_warmup: int
    more_steady: int

    @property
    def traced(self) -> int:
        return self.warmup + self.steady

    @property
    def left_out(self) -> int:
        return self.more_warmup + self.more_steady


def fewer(plan: PipelinePlan, place: int) -> Fewer | None:
    """What to trace of the schedule of process `place` of a pipeline; None: all of it."""
    if plan.csv is not None or plan.schedule not in ("GPipe", "1F1B") or len(plan.stages_of(place)) != 1:
        return None
    warmup = plan.microbatches
    if plan.schedule == "1F1B":
        warmup = min(warmup, len(plan.stages) - place)
    steady = plan.microbatches - warmup
    # C is seen between two forwards after a backward, or two backwards that are neither first nor last.
    kept = (3, min(steady, 1)) if warmup >= 3 and steady else (min(warmup, 4), min(steady, 2))
    found = Fewer(*kept, warmup - kept[0], steady - kept[1])
    return found if found.left_out else None


def shorten(pipeline: Any, few: Fewer, tracker: MemoryTracker, note: Any) -> None:
    """Let `pipeline` run `few` of its microbatches, and tell `tracker` and `note` when each begins."""
    schedule, stage = pipeline._schedule, pipeline._stages[0]
    step, initialize, all_microbatches = schedule.step, schedule._initialize_stage, schedule._n_microbatches

    def whole(*args: Any, **kwargs: Any) -> Any:
        schedule._n_microbatches = all_microbatches  # for the buffers, and what splits the batch
        return step(*args, **kwargs)

    def initialized(*args: Any, **kwargs: Any) -> None:
        initialize(*args, **kwargs)
        schedule._n_microbatches = few.traced
        schedule._num_stages = stage.stage_index + few.warmup  # 1F1B's warmup is the difference

    def told(kind: str, chunk: Any) -> Any:
        def run(number: int, *args: Any, **kwargs: Any) -> Any:
            tracker.begin((kind, number))
            note((kind, number))
            return chunk(number, *args, **kwargs)

        return run

    schedule.step, schedule._initialize_stage = whole, initialized
    stage.forward_one_chunk = told(FORWARD, stage.forward_one_chunk)
    stage.backward_one_chunk = told(BACKWARD, stage.backward_one_chunk)


@dataclass(frozen=True)
class Stretched:
    """The log of a process with all microbatches, of which `few` are in `log`."""

    log: Log
    few: Fewer

    @property
    def places(self) -> Sequence[Place | None]:
        return self.log.places

    def peaks(self, without: Iterable[str] = ()) -> list[tuple[str, _Held]]:
        """As `Log.peaks`, for the pieces that were traced. `NotAlike` if they are not linear."""
        peaks, few = self.log.peaks(without), self.few
        batches: dict[int, dict[Action, list[tuple[Place | None, _Held]]]] = {}
        for batch, action, place, (_, held) in zip(
            self.log.batches, self.log.actions, self.log.places, peaks, strict=True
        ):
            if action is not None:
                batches.setdefault(batch, {}).setdefault(action, []).append((place, held))
        residues = {batch: _residues(actions, few) for batch, actions in batches.items()}
        found, over = [], dict.fromkeys(peaks[0][1], 0)  # over: what the last batch left
        for batch, action, (name, held) in zip(self.log.batches, self.log.actions, peaks, strict=True):
            more = over
            if action is not None:
                flying, done = residues[batch]
                over = {kind: few.left_out * done[kind] for kind in held}
                in_flight, finished = _more(action, few)
                more = {kind: in_flight * flying[kind] + finished * done[kind] for kind in held}
            found.append((name, {kind: size + more[kind] for kind, size in held.items()}))
        return found


def _more(action: Action, few: Fewer) -> tuple[int, int]:
    """Microbatches (in flight, done) that the whole schedule has more at `action` than the short one."""
    (kind, number), last = action, few.traced - 1
    if kind == FORWARD and number < few.warmup:
        return (few.more_warmup if number == few.warmup - 1 else 0), 0
    if kind == BACKWARD and number == last:
        return 0, few.left_out
    if kind == BACKWARD:  # the first is the whole schedule's first if a steady state follows
        return few.more_warmup, 0 if number == 0 and few.steady else few.more_steady
    return few.more_warmup, few.more_steady if number == last else 0


def _residues(actions: dict[Action, list[tuple[Place | None, _Held]]], few: Fewer) -> tuple[_Held, _Held]:
    """Bytes by kind that one more microbatch leaves (until its backward, until the step's end)."""

    def step(kind: str, first: int) -> _Held:
        before, after = (
            [held for place, held in actions[kind, number] if place is not None and place[0] == kind]
            for number in (first, first + 1)
        )
        if len(before) != len(after) or not before:
            raise NotAlike
        steps = [{k: b[k] - a[k] for k in a} for a, b in zip(before, after, strict=True)]
        if any(other != steps[0] for other in steps):
            raise NotAlike
        return steps[0]

    last = few.traced - 1
    flying = step(FORWARD, 1) if few.warmup >= 3 else dict.fromkeys(actions[FORWARD, 0][0][1], 0)
    if few.steady >= 2:
        done = step(FORWARD, few.warmup)
    else:
        lost = step(BACKWARD, last - 2)
        done = {kind: lost[kind] + flying[kind] for kind in lost}
    return flying, done


def stretched(counts: Counts, noted: Sequence[Noted], few: Fewer) -> Counts:
    """Counts of all microbatches. `noted`: at the beginning of each action. `NotAlike` if they differ."""
    found = counts.plus(Counts())
    for position, (action, before) in enumerate(noted):
        kind, number = action
        if number != 1:
            continue
        one = noted[position + 1][1].plus(before, -1)
        if kind == FORWARD:
            later = next(p for p in range(position, len(noted)) if noted[p][0] == (FORWARD, 2))
            if vars(noted[later + 1][1].plus(noted[later][1], -1)) != vars(one):
                raise NotAlike
        found = found.plus(one, few.left_out)
    return found
