"""Options that cannot be combined: one row per conflict, in the words of its message."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from octavo.config import layer_recipes, names
from octavo.config.needs import chooses_implementation, fuses, uses_previous_step
from octavo.config.optimizers import OPTIMIZERS, OptimizerKind
from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError, Problem


@dataclass(frozen=True)
class Conflict:
    """`key` cannot have its value if `there(job, processes, gpus)`. `what` continues the key and its value; a
    {section.key} in it stands for that key with its value, {processes} for their number.
    """

    key: str
    there: Callable[[JobConfig, int, int | None], bool]
    what: str
    remedy: str


def _converts(job: JobConfig) -> bool:
    return "float8" in job.model.converters


def _gathers_nothing(job: JobConfig) -> bool:
    """Float8 gathers are asked for, and no recipe in use has a weight that can be gathered in float8."""
    if not (_converts(job) and job.float8.enable_fsdp_float8_all_gather):
        return False
    try:
        return not set(layer_recipes.recipes_named(job.float8)) & set(names.GATHERABLE_RECIPES)
    except ConfigError:  # reported by another check
        return False


def _of_optimizer(row: OptimizerKind) -> Iterator[Conflict]:
    """What one optimizer cannot do."""
    if row.low_bit is None:
        yield Conflict(
            "optimizer.name",
            lambda job, *_: job.optimizer.name == row.name and job.training.dtype == "bfloat16",
            "rounds weights to nearest, so that {training.dtype} would lose small updates",
            "choose AdamW, which rounds them stochastically",
        )
    if row.why_whole is not None:
        yield Conflict(
            "optimizer.name",
            lambda job, processes, _: job.optimizer.name == row.name and processes != _copies(job),
            f"needs whole parameters, because {row.why_whole}",
            "train on one process or on copies (parallelism.data_parallel_replicate_degree), or choose AdamW "
            "with optimizer.state_dtype = bfloat16",
        )
    if row.implementations:
        yield Conflict(
            "optimizer.implementation",
            lambda job, *_: (
                job.optimizer.name == row.name
                and chooses_implementation(job)
                and job.optimizer.implementation not in row.implementations
            ),
            f": {row.name} has only {' and '.join(row.implementations)}",
            f"set optimizer.implementation = {' or '.join(row.implementations)}",
        )


def _copies(job: JobConfig) -> int:
    return job.parallelism.data_parallel_replicate_degree * job.parallelism.pipeline_parallel_degree


def _rotates(job: JobConfig) -> bool:
    degree, method = job.parallelism.context_parallel_degree, job.parallelism.context_parallel_rotate_method
    return degree > 1 and method == "alltoall"


def _refuses_another(job: JobConfig) -> bool:
    """Held-out samples have the length of the training's."""
    settings = job.validation
    held_out = bool(settings.fraction) and settings.dataset is None
    return held_out and settings.seq_len not in (None, job.training.seq_len)


def _not_split(key: str, axis: str, what: str, remedy: str, active: Callable[[JobConfig], bool]) -> Conflict:
    """`key` does not go together with several processes along `axis`."""
    degree = f"parallelism.{axis}_parallel_degree"
    return Conflict(key, lambda job, *_: active(job) and job.get(degree) > 1, what, remedy)


def _chunked(axis: str, why: str) -> Conflict:
    what = f"cannot be combined with {{parallelism.{axis}_parallel_degree}}: {why}"
    key = "training.loss_chunk_tokens"
    return _not_split(key, axis, what, "leave one of the two out", lambda job: job.get(key) is not None)


def _health(axis: str, why: str) -> Conflict:
    what = f": with {{parallelism.{axis}_parallel_degree}} {why}, so nothing can be measured"
    remedy = "set it to 0, and measure in a run with data parallelism only"
    key = "float8.health_every"
    return _not_split(key, axis, what, remedy, lambda job: _converts(job) and job.get(key) > 0)


def _rewind(key: str) -> Conflict:
    return Conflict(
        key,
        lambda job, *_: job.get(key) == "rewind" and not job.checkpoint.enable,
        "loads a checkpoint, and none is saved",
        "add --checkpoint.enable",
    )


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "float8.enable_fsdp_float8_all_gather",
        lambda job, *_: _gathers_nothing(job),
        ": {float8.recipe_name} casts a weight differently for the output and for grad_input, so no single "
        "float8 weight can be gathered",
        f"set float8.recipe_name = {' or '.join(names.GATHERABLE_RECIPES)}, or gather in high precision",
    ),
    Conflict(
        "model.fuse",
        lambda job, *_: job.model.fuse == "on" and uses_previous_step(job),
        ": fused layers cast with the maxima of the current step, and the recipe "
        f"{names.PREVIOUS_STEP_RECIPES[0]} with those of the previous one",
        "leave it at auto, which then calls the modules one by one, or choose another recipe",
    ),
    _not_split(
        "model.fuse",
        "tensor",
        ": tensor parallel weights are not fused",
        "leave it at auto, which calls the modules one by one there, or set "
        "parallelism.tensor_parallel_degree = 1",
        lambda job: job.model.fuse == "on",
    ),
    Conflict(
        "float8.share_scales",
        lambda job, *_: (
            job.float8.share_scales
            and _converts(job)
            and fuses(job)
            and job.float8.enable_fsdp_float8_all_gather
        ),
        ": weights gathered in float8 have one scale each",
        "leave out one of the two: this, or float8.enable_fsdp_float8_all_gather",
    ),
    _chunked("tensor", "each of its devices already holds only a part of the vocabulary"),
    _chunked("pipeline", "its last stage computes the loss from whole logits"),
    *(conflict for row in OPTIMIZERS.values() for conflict in _of_optimizer(row)),
    _health("tensor", "each process has only a part of every operand"),
    _health("pipeline", "the schedule itself runs forward and backward"),
    # What ring attention cannot do; see distributed/ring_attention.py.
    Conflict(
        "parallelism.context_parallel_rotate_method",
        lambda job, *_: _rotates(job) and job.training.document_mask,
        "supports no masks, and {training.document_mask}",
        "set it to allgather",
    ),
    Conflict(
        "parallelism.context_parallel_rotate_method",
        lambda job, _, gpus: _rotates(job) and bool(gpus) and job.training.mixed_precision_param == "float32",
        "uses the flash kernel, which has no float32 on a GPU",
        "set it to allgather, or set training.mixed_precision_param = bfloat16",
    ),
    # CPU offload is a feature of FSDP, which one process that computes in float32 does not use.
    Conflict(
        "training.enable_cpu_offload",
        lambda job, processes, _: (
            job.training.enable_cpu_offload
            and processes == 1
            and job.training.mixed_precision_param == "float32"
        ),
        "works with several processes, or with training.mixed_precision_param = bfloat16",
        "change one of the two",
    ),
    Conflict(
        "checkpoint.create_seed_checkpoint",
        lambda job, processes, _: job.checkpoint.create_seed_checkpoint and processes > 1,
        "is for one process, and there are {processes}",
        "set NGPU=1",
    ),
    Conflict(
        "checkpoint.create_seed_checkpoint",
        lambda job, *_: (
            job.checkpoint.create_seed_checkpoint and job.checkpoint.initial_load_path is not None
        ),
        "writes the initial weights",
        "leave checkpoint.initial_load_path out",
    ),
    _rewind("fault_tolerance.non_finite"),
    _rewind("fault_tolerance.spike"),
    Conflict(
        "validation.fraction",
        lambda job, *_: job.validation.dataset is not None and job.validation.fraction > 0,
        ": {validation.dataset} is given, so nothing needs to be held out",
        "unset one of the two",
    ),
    Conflict(
        "validation.dataset_path",
        lambda job, *_: job.validation.dataset is None and job.validation.dataset_path is not None,
        "has no effect without validation.dataset",
        "name one, or unset this one",
    ),
    Conflict(
        "validation.seq_len",
        lambda job, *_: _refuses_another(job),
        ": the samples that validation.fraction holds out have {training.seq_len}",
        "leave it out, or name a validation.dataset",
    ),
    Conflict(
        "validation.seq_len",
        lambda job, *_: (job.validation.seq_len or 0) > job.training.seq_len,
        "exceeds {training.seq_len}, the number of positions that the model has",
        "lower it",
    ),
)


def conflicts(job: JobConfig, processes: int, gpus: int | None) -> Iterator[Problem]:
    """The conflicts among the settings of `job`."""
    for row in CONFLICTS:
        if row.there(job, processes, gpus):
            what = row.what.replace("{processes}", str(processes))
            what = re.sub(r"\{([a-z0-9_.]+)\}", lambda found: job.named(found[1]), what)
            yield job.problem(row.key, what, row.remedy)
