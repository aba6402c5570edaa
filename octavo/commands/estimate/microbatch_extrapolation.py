"""Extrapolates a pipeline's many microbatches from a trace of a few.

All microbatches of a pipeline are alike: a forward leaves R bytes until its backward, and the backward leaves
C bytes until the end of the step (a received activation's gradient, a loss). So the memory at a moment is
that at the same moment of a shorter schedule, plus R for each additional microbatch in flight, plus C for
each additional finished one. R and C are differences between consecutive microbatches of the short schedule.
If these are not the same everywhere, all microbatches are traced.

A rank of the schedules 1F1B and GPipe executes F^w (B F)^n B^w, with w + n microbatches; the trace has a
smaller w and n. It keeps the first microbatch, which gathers weights and makes gradients; the last one, which
reduces them; and as many between them as are needed to measure R, C and the operations of a microbatch. Send
and receive buffers are those of all microbatches. Other schedules are traced whole.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.commands.estimate.memory_tracker import BACKWARD, FORWARD, Action, LayerPass, Log, MemoryTracker
from octavo.commands.estimate.operations import ActionCounts, Counts
from octavo.preflight.pipeline_plan import PipelinePlan

_Held = dict[str, int]


class NotLinear(Exception):
    """Consecutive microbatches differ by different amounts, so they cannot be extrapolated."""


@dataclass(frozen=True)
class ShortSchedule:
    """The traced schedule F^warmup (B F)^steady B^warmup, and the numbers of microbatches that it skips."""

    warmup: int
    steady: int
    skipped_warmup: int
    skipped_steady: int

    @property
    def traced(self) -> int:
        return self.warmup + self.steady

    @property
    def skipped(self) -> int:
        return self.skipped_warmup + self.skipped_steady


def short_schedule(plan: PipelinePlan, rank: int) -> ShortSchedule | None:
    """Return the schedule to trace for pipeline rank `rank`; None to trace all of its microbatches."""
    if plan.csv is not None or plan.schedule not in ("GPipe", "1F1B") or len(plan.stages_of(rank)) != 1:
        return None
    warmup = plan.microbatches
    if plan.schedule == "1F1B":
        warmup = min(warmup, len(plan.stages) - rank)
    steady = plan.microbatches - warmup
    # C needs two forwards after a backward, or two backwards that are neither first nor last.
    kept = (3, min(steady, 1)) if warmup >= 3 and steady else (min(warmup, 4), min(steady, 2))
    short = ShortSchedule(*kept, warmup - kept[0], steady - kept[1])
    return short if short.skipped else None


def run_short_schedule(
    pipeline: Any, short: ShortSchedule, tracker: MemoryTracker, begin_action: Callable[[Action], None]
) -> None:
    """Patch `pipeline` to run `short`, and to report each action to `tracker` and `begin_action`."""
    schedule, stage = pipeline._schedule, pipeline._stages[0]
    step, initialize, all_microbatches = schedule.step, schedule._initialize_stage, schedule._n_microbatches

    def step_with_all(*args: Any, **kwargs: Any) -> Any:
        schedule._n_microbatches = all_microbatches  # for the buffers and for splitting the batch
        return step(*args, **kwargs)

    def initialize_short(*args: Any, **kwargs: Any) -> None:
        initialize(*args, **kwargs)
        schedule._n_microbatches = short.traced
        schedule._num_stages = stage.stage_index + short.warmup  # 1F1B's warmup is the difference

    def reporting(kind: str, chunk: Any) -> Any:
        def run(number: int, *args: Any, **kwargs: Any) -> Any:
            tracker.mark_action((kind, number))
            begin_action((kind, number))
            return chunk(number, *args, **kwargs)

        return run

    schedule.step, schedule._initialize_stage = step_with_all, initialize_short
    stage.forward_one_chunk = reporting(FORWARD, stage.forward_one_chunk)
    stage.backward_one_chunk = reporting(BACKWARD, stage.backward_one_chunk)


@dataclass(frozen=True)
class ManyMicrobatchesLog:
    """The log of a rank with all microbatches; `log` has those of the schedule `short`."""

    log: Log
    short: ShortSchedule

    @property
    def layer_passes(self) -> Sequence[LayerPass | None]:
        return self.log.layer_passes

    def peaks(self, without: Iterable[str] = ()) -> list[tuple[str, _Held]]:
        """As `Log.peaks`, for the traced pieces. Raises `NotLinear` if they cannot be extrapolated."""
        peaks = self.log.peaks(without)
        batches: dict[int, dict[Action, list[tuple[LayerPass | None, _Held]]]] = {}
        for batch, action, layer_pass, (_, held) in zip(
            self.log.batches, self.log.actions, self.log.layer_passes, peaks, strict=True
        ):
            if action is not None:
                batches.setdefault(batch, {}).setdefault(action, []).append((layer_pass, held))
        residues = {batch: _residues(actions, self.short) for batch, actions in batches.items()}
        extrapolated, left_over = [], dict.fromkeys(peaks[0][1], 0)  # left_over: of the previous batch
        for batch, action, (name, held) in zip(self.log.batches, self.log.actions, peaks, strict=True):
            extra = left_over
            if action is not None:
                until_backward, until_end = residues[batch]
                left_over = {kind: self.short.skipped * until_end[kind] for kind in held}
                in_flight, finished = _additional_microbatches(action, self.short)
                extra = {kind: in_flight * until_backward[kind] + finished * until_end[kind] for kind in held}
            extrapolated.append((name, {kind: size + extra[kind] for kind, size in held.items()}))
        return extrapolated


def _additional_microbatches(action: Action, short: ShortSchedule) -> tuple[int, int]:
    """Microbatches (in flight, finished) at `action` that the whole schedule has in addition to `short`."""
    (kind, number), last = action, short.traced - 1
    if kind == FORWARD and number < short.warmup:
        return (short.skipped_warmup if number == short.warmup - 1 else 0), 0
    if kind == BACKWARD and number == last:
        return 0, short.skipped
    if kind == BACKWARD:  # the first is the whole schedule's first if a steady state follows
        return short.skipped_warmup, 0 if number == 0 and short.steady else short.skipped_steady
    return short.skipped_warmup, short.skipped_steady if number == last else 0


def _residues(
    actions: dict[Action, list[tuple[LayerPass | None, _Held]]], short: ShortSchedule
) -> tuple[_Held, _Held]:
    """Bytes by kind that a microbatch holds (until its backward, then until the end of the step): R and C."""

    def difference(kind: str, first: int) -> _Held:
        before, after = (
            [held for layer_pass, held in actions[kind, number] if layer_pass and layer_pass[0] == kind]
            for number in (first, first + 1)
        )
        if len(before) != len(after) or not before:
            raise NotLinear
        differences = [{k: b[k] - a[k] for k in a} for a, b in zip(before, after, strict=True)]
        if any(other != differences[0] for other in differences):
            raise NotLinear
        return differences[0]

    if short.warmup >= 3:
        until_backward = difference(FORWARD, 1)
    else:
        until_backward = dict.fromkeys(actions[FORWARD, 0][0][1], 0)
    if short.steady >= 2:
        return until_backward, difference(FORWARD, short.warmup)
    released = difference(BACKWARD, short.traced - 3)
    return until_backward, {kind: released[kind] + until_backward[kind] for kind in released}


def extrapolate_microbatches(
    counts: Counts, by_action: Sequence[ActionCounts], short: ShortSchedule
) -> Counts:
    """Return the counts of all microbatches; raises `NotLinear` if the traced ones differ.

    by_action: the counts at the beginning of each action of `short`.
    """
    total = counts.plus(Counts())
    for position, (action, before) in enumerate(by_action):
        kind, number = action
        if number != 1:
            continue
        one = by_action[position + 1][1].plus(before, -1)
        if kind == FORWARD:
            later = next(p for p in range(position, len(by_action)) if by_action[p][0] == (FORWARD, 2))
            if vars(by_action[later + 1][1].plus(by_action[later][1], -1)) != vars(one):
                raise NotLinear
        total = total.plus(one, short.skipped)
    return total
