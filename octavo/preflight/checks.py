"""Checks whether a job can run here, before torch is imported and before any process is started.

`load` has checked names and types; `check` checks values: each option by itself (`option_checks.py`), options
that conflict (`conflicts.py`), files (`file_checks.py`), and here the arithmetic of layouts and batches.
Checks that need the data, the model or the device (does the corpus fill one batch? does the filter match a
layer?) come later.
"""

from collections.abc import Iterator

from octavo.config import layer_recipes, names, option_checks, torchtitan
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError, Problem, did_you_mean
from octavo.families import FAMILIES
from octavo.preflight import file_checks, model_settings
from octavo.preflight.conflicts import conflicts
from octavo.preflight.pipeline_plan import plan_of
from octavo.preflight.pipeline_plan import problems as pipeline_problems
from octavo.preflight.sizes import args_of, shared_sizes, undivided, units, unsplit


def check(job: JobConfig, *, world_size: int, gpus: int | None = None, elsewhere: bool = False) -> None:
    """Check a loaded job for `world_size` processes on a machine with `gpus` GPUs (None: unknown).

    `elsewhere`: the job will run on another machine, so files, packages and compilers are not checked.

    Raises:
        ConfigError: with one line for each thing wrong.
    """
    problems = list(option_checks.out_of_range(job))
    if not problems:  # the other checks calculate with the values
        problems = [
            *_layout(job, world_size),
            *file_checks.on_disk(_pipeline, job, "parallelism.pipeline_parallel_schedule_csv"),
            *_warmup(job),
            *_model(job),
            *_layer_recipes(job),
            *conflicts(job, world_size, gpus),
            *(option_checks.without_gpu(job) if gpus == 0 else ()),
            *(() if elsewhere else _here(job, gpus)),
        ]
    problems += option_checks.without_effect(job, world_size)
    if problems:
        raise ConfigError(problems)


def each(job: JobConfig, gpus: int | None) -> list[Problem]:
    """The wrong values of `job` that can be checked alone, whatever else is wrong."""
    problems = [*option_checks.out_of_range(job), *_here(job, gpus)]
    if "model.name" in job.given:  # a flavor is one of a model, which may be what could not be read
        problems += _model(job)
    return problems


def _here(job: JobConfig, gpus: int | None) -> Iterator[Problem]:
    yield from file_checks.on_this_machine(job, gpus)
    yield from option_checks.without_package(job)


def notes(job: JobConfig) -> list[str]:
    """Sentences for the log about settings that are allowed but may surprise."""
    warmup, (span, steps) = job.lr_scheduler.warmup_steps, _schedule(job)
    if warmup > steps:
        return [f"lr_scheduler.warmup_steps = {warmup} exceeds {span} = {steps}: every step is warm-up"]
    overlap = _overlap(job)
    return [f"{overlap}: the decay begins after warm-up instead"] if overlap else []


def _overlap(job: JobConfig) -> str | None:
    """Describes warm-up and decay, if together they take more than all steps."""
    warmup, ratio, (span, steps) = job.lr_scheduler.warmup_steps, job.lr_scheduler.decay_ratio, _schedule(job)
    if ratio is None or warmup >= steps or warmup + (decay := round(steps * ratio)) <= steps:
        return None
    return (
        f"lr_scheduler.warmup_steps = {warmup} and lr_scheduler.decay_ratio = {ratio:g} ({decay} steps) "
        f"overlap in {span} = {steps}"
    )


def _schedule(job: JobConfig) -> tuple[str, int]:
    """The option that decides how long the learning-rate schedule is, and that length in steps."""
    total = job.lr_scheduler.total_steps
    return ("training.steps", job.training.steps) if total is None else ("lr_scheduler.total_steps", total)


def _warmup(job: JobConfig) -> Iterator[Problem]:
    """A schedule shorter than the run; a warm-up longer than the schedule. Such a warm-up is refused only if
    given by flag, because a short trial of a long job is no mistake; see `notes`.
    """
    key, (span, steps) = "lr_scheduler.warmup_steps", _schedule(job)
    if steps < job.training.steps:
        less = f"is less than training.steps = {job.training.steps}"
        yield job.problem(span, less, "a schedule spans the run, or is longer")
    if job.given.get(key) == "cli" and job.lr_scheduler.warmup_steps > steps:
        yield job.problem(key, f"exceeds {span} = {steps}", "optimizer.lr would not be reached")
    given = [job.given.get(name) for name in (key, "lr_scheduler.decay_ratio")]
    if "cli" in given and None not in given and (overlap := _overlap(job)):
        yield Problem(overlap, "lower one of the two", key, job.where[key])


def _layout(job: JobConfig, world_size: int) -> Iterator[Problem]:
    try:
        layout = parallel_dims_of(job.parallelism, world_size)
    except ConfigError as error:
        yield from error.problems
        return
    yield from _batch(job, layout)
    args = args_of(job)
    wrong: list[str] = []
    if args:
        wrong += unsplit(args, tensor=layout.tensor, context=layout.context)
        wrong += undivided(shared_sizes(args), layout.tensor)
    yield from map(Problem, wrong) if wrong else _sequence(job, layout)


def _pipeline(job: JobConfig) -> Iterator[Problem]:
    """Errors in the pipeline's settings, and in its stages if octavo ships the model."""
    problems = list(pipeline_problems(job))
    args = args_of(job)
    if not problems and args and job.parallelism.pipeline_parallel_degree > 1:
        try:
            plan_of(job, units(args))
        except ConfigError as error:
            problems = list(error.problems)
    yield from problems


def _batch(job: JobConfig, layout: ParallelDims) -> Iterator[Problem]:
    total, local = job.training.global_batch_size, job.training.local_batch_size
    one_pass = local * layout.data
    if total == -1 or total % one_pass == 0:
        return
    below = total // one_pass * one_pass
    fitting = f"{below} or {below + one_pass}" if below else str(one_pass)
    who = "processes" if layout.context == layout.tensor == 1 else "data parallel groups"
    yield job.problem(
        "training.global_batch_size",
        f"is not a multiple of local_batch_size x {who} = {local} x {layout.data} = {one_pass}",
        f"{fitting} would be, or change local_batch_size",
    )


def _sequence(job: JobConfig, layout: ParallelDims) -> Iterator[Problem]:
    multiple = layout.sequence_multiple
    for key in ("training.seq_len", "validation.seq_len"):
        length = job.get(key)
        if length is not None and length % multiple:
            terms = [f"tensor_parallel_degree = {layout.tensor}"] if layout.tensor > 1 else []
            terms += [f"2 x context_parallel_degree = {2 * layout.context}"] if layout.context > 1 else []
            below = length // multiple * multiple
            yield job.problem(
                key,
                f"must be a multiple of {' times '.join(terms)}, so that the devices get equal parts",
                f"{f'{below} or ' if below else ''}{below + multiple} would be",
            )


def _model(job: JobConfig) -> Iterator[Problem]:
    name, flavor = job.model.name, job.model.flavor
    if job.experimental.custom_import:  # it may register other names
        yield from file_checks.custom_import(job)
    elif name not in names.MODELS:
        known = f"known: {', '.join(names.MODELS)}{did_you_mean(name, names.MODELS)}"
        yield job.problem("model.name", ": no such model", known)
    elif flavor not in names.MODELS[name]:
        flavors = names.MODELS[name]
        has = f"it has {', '.join(flavors)}{did_you_mean(flavor, flavors)}"
        has += torchtitan.missing_value("model.flavor", flavor)
        yield job.problem("model.flavor", f": {name} has no such flavor", has)
    else:
        try:
            model_settings.apply(FAMILIES[name].flavors[flavor], job.model.args)
        except ConfigError as error:
            yield Problem(str(error), key="model.args", where=job.where.get("model.args", ""))


def _layer_recipes(job: JobConfig) -> Iterator[Problem]:
    key, where = layer_recipes.KEY, job.where.get(layer_recipes.KEY, "")
    for message in layer_recipes.wrong(job.float8):
        yield Problem(f"{key} ({where or 'the default'}): {message}", key=key, where=where)
