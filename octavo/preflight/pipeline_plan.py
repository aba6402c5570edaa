"""Divides a model into pipeline stages and assigns them to processes, without torch.

A *unit* is never divided: the embedding, a layer, or the head (the last norm with the output projection). A
*stage* is a sequence of consecutive units. A process has one stage, or several under an interleaved schedule.
By default stages have equal numbers of layers, except that the first has
`pipeline_parallel_first_stage_less_layers` fewer, for its embedding, and the last has
`pipeline_parallel_last_stage_less_layers` fewer, for its head. So with one stage more than layers, or two,
the head, and the embedding, are a stage of their own, as in torchtitan.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from octavo.config import torchtitan
from octavo.config.needs import uses_previous_step
from octavo.config.schema import JobConfig, Parallelism
from octavo.core.errors import ConfigError, Problem, did_you_mean
from octavo.preflight import pipeline_csv

_P = "parallelism.pipeline_parallel_"


@dataclass(frozen=True)
class Schedule:
    """The requirements of one of torch's schedules.

    stages: the least per process, and the default. most: the most per process. v_shaped: the second half of
    the stages runs back through the processes. microbatch_per_process: at least one microbatch for each
    process. rounds_divide: the number of microbatches must be a multiple of its rounds (microbatches //
    processes). splits: gradients of inputs and of weights are computed in separate passes. csv: a CSV file
    has the order.
    """

    stages: int
    most: int | None = None
    v_shaped: bool = False
    microbatch_per_process: bool = False
    rounds_divide: bool = False
    splits: bool = False
    csv: bool = False


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "GPipe": Schedule(1, most=1),
        "1F1B": Schedule(1, most=1, microbatch_per_process=True),
        "LoopedBFS": Schedule(2),
        "Interleaved1F1B": Schedule(2, rounds_divide=True),
        "InterleavedZeroBubble": Schedule(2, rounds_divide=True, splits=True),
        "ZBVZeroBubble": Schedule(2, most=2, v_shaped=True, splits=True),
        "PipelineScheduleSingle": Schedule(1, most=1, csv=True),
        "PipelineScheduleMulti": Schedule(2, csv=True),
    }
)
"""torch's name of a schedule -> its requirements."""


@dataclass(frozen=True)
class PipelinePlan:
    """stages: the names of the modules in each. process_of: stage -> its process along the pipeline axis.
    csv: the file with the order of actions, or None for the schedule's own order.
    """

    schedule: str
    stages: tuple[tuple[str, ...], ...]
    process_of: tuple[int, ...]
    microbatches: int
    csv: Path | None = None

    def stages_of(self, process: int) -> list[int]:
        """The stages of `process`, ascending."""
        return [stage for stage, owner in enumerate(self.process_of) if owner == process]


def microbatches(job: JobConfig) -> int:
    """The number of microbatches in a local batch."""
    return job.training.local_batch_size // job.parallelism.pipeline_parallel_microbatch_size


def plan_of(job: JobConfig, units: Sequence[Sequence[str]]) -> PipelinePlan:
    """The stages of a model made of `units`, each the names of its modules, in the order of computation.

    The job has passed `problems`.

    Raises:
        ConfigError: these units cannot form the requested stages.
    """
    settings = job.parallelism
    degree, name = settings.pipeline_parallel_degree, _name(settings)
    assert name is not None
    rows = _rows(settings)
    layers = len(units) - 2
    if settings.pipeline_parallel_split_points:
        cuts = _given_cuts(job, units)
    else:
        count = _count(job, name, layers)
        if layers + sum(map(bool, _less(settings))) < count:
            per_stage = settings.pipeline_parallel_layers_per_stage
            by, remedy = (_P + "degree", "lower") if per_stage is None else (_P + "layers_per_stage", "raise")
            makes = f"makes {degree} x {count // degree} = {count} stages"
            what = f"{makes}, which need a layer, the embedding or the head, and this model has {layers}"
            raise ConfigError([job.problem(by, what, f"{remedy} it")])
        cuts = _even_cuts(job, count, layers)
    bounds = [0, *cuts, len(units)]
    stages = tuple(
        tuple(module for unit in units[first:last] for module in unit)
        for first, last in itertools.pairwise(bounds)
    )
    if rows is not None:
        process_of = pipeline_csv.processes(rows)
    elif SCHEDULES[name].v_shaped:
        process_of = tuple(min(stage, 2 * degree - 1 - stage) for stage in range(len(stages)))
    else:
        process_of = tuple(stage % degree for stage in range(len(stages)))
    return PipelinePlan(name, stages, process_of, microbatches(job), _csv_path(settings))


def splits_backward(settings: Parallelism) -> bool:
    """Whether the schedule computes the gradients of inputs and of weights in separate passes."""
    rows, name = _rows(settings), _name(settings)
    if rows is not None:
        return any(action.kind == "I" for row in rows for action in row)
    return name is not None and SCHEDULES[name].splits


def problems(job: JobConfig) -> Iterator[Problem]:
    """What is wrong with the pipeline's settings and does not depend on the model. Raises OSError."""
    settings = job.parallelism
    if settings.pipeline_parallel_degree == 1:
        return
    name = _name(settings)
    if name is None:
        written = settings.pipeline_parallel_schedule
        hint = did_you_mean(written, SCHEDULES) + torchtitan.missing_value(_P + "schedule", written)
        yield job.problem(_P + "schedule", f": no such schedule; there are {', '.join(SCHEDULES)}{hint}")
        return
    if job.training.local_batch_size % settings.pipeline_parallel_microbatch_size:
        size = job.named(_P + "microbatch_size")
        what = f"is not a multiple of {size}, so it does not divide into microbatches"
        yield job.problem("training.local_batch_size", what, "change one")
        return
    try:
        yield from _of_csv(job, name) if settings.pipeline_parallel_schedule_csv else _of_schedule(job, name)
        yield from _of_split_points(job, name)
        splits = splits_backward(settings)
    except ConfigError as error:
        yield from error.problems
        return
    if splits:
        yield from _of_split_backward(job)
    if uses_previous_step(job) and (splits or SCHEDULES[name].stages > 1):
        yield job.problem(
            "float8.recipe_name",
            f"records maxima per step, not supported if a process has several stages ({name})",
            f"choose another recipe, or {_P}schedule = 1F1B",
        )


def _of_split_backward(job: JobConfig) -> Iterator[Problem]:
    """Settings that conflict with separate passes for the gradients of inputs and of weights."""
    apart = ": this pipeline schedule computes the gradients of inputs and of weights separately, and"
    instead = f"set {_P}schedule = Interleaved1F1B"
    if job.compile.enable and "model" in job.compile.components:
        yield job.problem(
            "compile.enable",
            f"{apart} a compiled layer can only compute both together, so that each would be computed twice",
            f"leave compilation out, compile the loss alone (--compile.components=loss), or {instead}",
        )
    if job.parallelism.fsdp_reshard_after_forward == "always":
        # FSDP2 reduces the gradients of what is gathered, and weights' come when that is freed again.
        yield job.problem(
            "parallelism.fsdp_reshard_after_forward",
            f"{apart} FSDP2 would have freed the weights between the two, and lose gradients",
            f"leave it at default, or {instead}",
        )
    checkpointing = job.activation_checkpoint
    if checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op":
        yield job.problem(
            "activation_checkpoint.mode",
            f"{apart} selective checkpointing of operations can run backward through a layer only once",
            f"set activation_checkpoint.mode = full, or {instead}",
        )


def _name(settings: Parallelism) -> str | None:
    """torch's spelling of the schedule, whatever case it was written in."""
    written = settings.pipeline_parallel_schedule.lower()
    return next((name for name in SCHEDULES if name.lower() == written), None)


def _csv_path(settings: Parallelism) -> Path | None:
    written = settings.pipeline_parallel_schedule_csv
    return None if written is None else Path(written).expanduser()


def _rows(settings: Parallelism) -> list[list[pipeline_csv.ScheduleAction]] | None:
    path = _csv_path(settings)
    return None if path is None else pipeline_csv.read(path)


def _of_csv(job: JobConfig, name: str) -> Iterator[Problem]:
    if not SCHEDULES[name].csv and _P + "schedule" in job.given:
        yield job.problem(
            _P + "schedule",
            f"and {job.named(_P + 'schedule_csv')} are two schedules",
            "leave one out, or name PipelineScheduleSingle or PipelineScheduleMulti, which stand for the "
            "file's own",
        )
    rows = _rows(job.parallelism)
    assert rows is not None
    wrong = pipeline_csv.problem(rows, job.parallelism.pipeline_parallel_degree, microbatches(job))
    if wrong is not None:
        yield job.problem(_P + "schedule_csv", wrong)


def _of_schedule(job: JobConfig, name: str) -> Iterator[Problem]:
    schedule, degree, count = SCHEDULES[name], job.parallelism.pipeline_parallel_degree, microbatches(job)
    key = _P + "schedule"
    terms = f"local_batch_size / pipeline_parallel_microbatch_size = {count}"
    if schedule.csv:
        yield job.problem(key, "takes its order from a file", f"add --{_P}schedule_csv")
    if schedule.microbatch_per_process and count < degree:
        yield job.problem(
            key,
            f"needs a microbatch for each stage, and there are {degree} stages and {terms} microbatches",
            f"raise training.local_batch_size, or lower {_P}microbatch_size",
        )
    rounds = max(1, count // degree)
    if schedule.rounds_divide and count % rounds:
        yield job.problem(
            key,
            f"takes microbatches in {rounds} rounds, as often as they fill the {degree} stages of a round, "
            f"and {terms} do not divide by {rounds}",
            f"{count // degree * degree} or {(count // degree + 1) * degree} would do",
        )


def _of_split_points(job: JobConfig, name: str) -> Iterator[Problem]:
    points = job.parallelism.pipeline_parallel_split_points
    if points:
        yield from _of_count(job, name, len(points) + 1, "split_points", f"names {len(points)} cuts, which")


def _of_count(job: JobConfig, name: str, count: int, key: str, makes: str) -> Iterator[Problem]:
    """A problem if the schedule cannot have the `count` stages that `key` makes."""
    degree, rows, schedule = job.parallelism.pipeline_parallel_degree, _rows(job.parallelism), SCHEDULES[name]
    each, over = divmod(count, degree)
    if rows is not None:
        wanted = len(pipeline_csv.processes(rows))
        if count != wanted:
            what = f"{makes} makes {count} stages, and {_P}schedule_csv has {wanted}"
            yield job.problem(_P + key, what)
    elif over or each < schedule.stages or each > (schedule.most or each):
        several = f"{schedule.stages}{' or more' if schedule.most is None else ''}"
        wanted = degree * schedule.stages
        more = f", {2 * wanted}, ..." if schedule.most is None else ""
        yield job.problem(
            _P + key,
            f"{makes} makes {count} stages, and {name} takes {several} for each of the {degree} processes "
            f"({wanted}{more} stages in all, {wanted - 1}{', ...' if more else ''} cuts)",
            "change it, or the schedule",
        )


def _count(job: JobConfig, name: str, layers: int) -> int:
    """The number of stages without split points."""
    settings = job.parallelism
    rows, per_stage = _rows(settings), settings.pipeline_parallel_layers_per_stage
    if rows is not None:
        return len(pipeline_csv.processes(rows))
    if per_stage is None:
        return settings.pipeline_parallel_degree * SCHEDULES[name].stages
    first, last = _less(settings)
    count = math.ceil((layers + first + last) / per_stage)
    terms = (
        f": {layers} layers + {first} for the embedding + {last} for the head, by {per_stage}, rounded up,"
    )
    wrong = list(_of_count(job, name, count, "layers_per_stage", terms))
    if wrong:
        raise ConfigError(wrong)
    return count


def _less(settings: Parallelism) -> tuple[int, int]:
    return (
        settings.pipeline_parallel_first_stage_less_layers,
        settings.pipeline_parallel_last_stage_less_layers,
    )


def _given_cuts(job: JobConfig, units: Sequence[Sequence[str]]) -> list[int]:
    """The index of the unit that begins each stage but the first, from the split points."""
    points, names = job.parallelism.pipeline_parallel_split_points, [unit[0] for unit in units]
    key = _P + "split_points"
    for point in points:
        if point not in names[1:]:
            what = (
                f": {point!r} is no part of this model, which has {names[1]} to {names[-2]}, then {names[-1]}"
            )
            raise ConfigError([job.problem(key, what + did_you_mean(point, names[1:]))])
    cuts = [names.index(point) for point in points]
    if cuts != sorted(cuts):
        ordered = ",".join(names[cut] for cut in sorted(cuts))
        raise ConfigError([job.problem(key, "are out of order", f"the model's order is {ordered}")])
    return cuts


def _even_cuts(job: JobConfig, count: int, layers: int) -> list[int]:
    """Boundaries of `count` stages with loads as equal as possible. Each has at least one layer, unless there
    are too few: then the head, and next the embedding, are a stage of their own.
    """
    first, last = _less(job.parallelism)
    have = [1] * count
    for end in ([-1] if last else []) + ([0] if first else []):
        if sum(have) > layers:
            have[end] = 0
    load = list(have)  # in layers
    load[0] += first
    load[-1] += last
    for _ in range(layers - sum(have)):
        stage = load.index(min(load))
        load[stage] += 1
        have[stage] += 1
    cuts, at = [], 1  # after the embedding
    for number in have[:-1]:
        at += number
        cuts.append(at)
    return cuts
