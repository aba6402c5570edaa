"""What options need to have an effect: conditions on the whole job, each stated once.

Someone who types `--float8.recipe_name=rowwise` and forgets `--model.converters=float8` would train in
bfloat16 without knowing it. So a flag without effect is an error. The same setting in a TOML file is ignored,
because one file serves several commands. A field of `schema.py` names its conditions; options without any
always have an effect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.config import names
from octavo.config.optimizers import OPTIMIZERS
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.core.errors import ConfigError

if TYPE_CHECKING:
    from octavo.config.schema import JobConfig, Training


@dataclass(frozen=True)
class Needs:
    """The option has an effect only if `met(job, processes)`. If not, `why` and `remedy` are the message."""

    met: "Callable[[JobConfig, int], bool]"
    why: str
    remedy: str = "leave it out"


def _layout(job: "JobConfig", processes: int) -> ParallelDims:
    """The job's degrees; if impossible, which another check reports, all processes shard one copy."""
    try:
        return parallel_dims_of(job.parallelism, processes)
    except ConfigError:
        return ParallelDims(shard=processes)


def casts_weights_again(job: "JobConfig", processes: int) -> bool:
    """Whether a float8 weight would be cast several times per step if its first cast were not kept: by
    several microbatches, by recomputation under activation checkpointing, or by gathers in float8.
    """
    layout = _layout(job, processes)
    accumulates = job.training.global_batch_size > job.training.local_batch_size * layout.data
    if layout.pipeline > 1:
        accumulates |= job.training.local_batch_size > job.parallelism.pipeline_parallel_microbatch_size
    gathers = job.float8.enable_fsdp_float8_all_gather and processes > 1
    return accumulates or gathers or job.activation_checkpoint.mode != "none"


def uses_previous_step(job: "JobConfig") -> bool:
    """Whether some layer takes its scales from the previous step."""
    # Unreadable patterns are reported by another check.
    recipes = {job.float8.recipe_name, *(text.partition("=")[2].strip() for text in job.float8.layer_recipes)}
    return "float8" in job.model.converters and bool(recipes & set(names.PREVIOUS_STEP_RECIPES))


def fuses(job: "JobConfig") -> bool:
    """Whether layers may be fused; with "auto" the device decides."""
    # Fused casts use the maxima of the current step.
    alone = job.parallelism.tensor_parallel_degree == 1 and not uses_previous_step(job)
    return job.model.fuse != "off" and alone


def ignores_document_starts(training: "Training") -> bool:
    """Whether the loss leaves out what follows a document's end."""
    return training.document_starts == "ignore" or (
        training.document_starts == "auto" and training.document_mask
    )


def chooses_implementation(job: "JobConfig") -> bool:
    """Whether the optimizer is one of PyTorch's, which has several implementations."""
    row, full = OPTIMIZERS[job.optimizer.name], job.optimizer.state_dtype == job.training.dtype == "float32"
    return bool(row.implementations) and (row.low_bit is None or full)


def _loads_by_name(job: "JobConfig") -> bool:
    settings = job.checkpoint
    whole = settings.initial_load_path is not None and not settings.initial_load_model_only
    return whole or (settings.enable and settings.load_step >= 0)


def _chunks(job: "JobConfig", processes: int) -> bool:
    training = job.training
    tokens = training.local_batch_size * training.seq_len // _layout(job, processes).context
    return training.loss_chunk_tokens is None or training.loss_chunk_tokens < tokens


def _reads_records(job: "JobConfig") -> bool:
    return any(d not in (None, "shakespeare") for d in (job.training.dataset, job.validation.dataset))


def _reaches_profile(job: "JobConfig") -> bool:
    settings = job.profiling
    profiles = settings.enable_profiling or settings.enable_memory_snapshot
    return not profiles or settings.profile_freq <= job.training.steps


def _when(met: "Callable[[JobConfig], bool]", why: str, remedy: str = "leave it out") -> Needs:
    return Needs(lambda job, _: met(job), why, remedy)


def _on(key: str, why: str) -> Needs:
    """The boolean option `key` is on."""
    return _when(lambda job: bool(job.get(key)), why, f"add --{key}")


def _several(axis: str, why: str) -> Needs:
    """There are several processes along `axis`."""
    key = f"parallelism.{axis}_parallel_degree"
    return _when(lambda job: job.get(key) > 1, why, f"add --{key}")


FLOAT8 = _when(
    lambda job: "float8" in job.model.converters,
    "the model is not converted to float8",
    'add --model.converters="float8"',
)
DELAYED_SCALING = _when(
    uses_previous_step,
    "scales are computed from the current tensors, so nothing exceeds them",
    f"add --float8.recipe_name={names.PREVIOUS_STEP_RECIPES[0]}",
)
FLOAT8_GATHER = _on("float8.enable_fsdp_float8_all_gather", "weights are not gathered in float8")
TENSORWISE = _when(
    lambda job: job.float8.recipe_name in (None, "tensorwise"),
    "only tensorwise has one scale per weight; other recipes join weights without it",
)
FUSION = _when(fuses, "nothing is fused", "set --model.fuse=on, and leave tensor parallelism out")
CASTS_AGAIN = Needs(
    casts_weights_again,
    "no weight is cast twice in a step: no accumulation, activation checkpointing or float8 gather",
)
HEALTH = _when(lambda job: job.float8.health_every > 0, "no step is measured", "add --float8.health_every")
REACHES_HEALTH = _when(
    lambda job: job.float8.health_every <= job.training.steps,
    "it exceeds training.steps, so no step is measured",
    "lower it",
)

CHECKPOINTS = _on("checkpoint.enable", "no checkpoints are saved or loaded")
SAVES = _when(
    lambda job: not job.checkpoint.load_only,
    "checkpoint.load_only saves nothing",
    "leave one of the two out",
)
LOADS_BY_NAME = _when(
    _loads_by_name,
    "a run that resumes loads everything, so that it continues exactly",
    "name what to load: --checkpoint.load_step, or --checkpoint.initial_load_path with "
    "--checkpoint.no-initial_load_model_only",
)
OTHER_RUN = _when(
    lambda job: job.checkpoint.initial_load_path is not None and not job.checkpoint.initial_load_in_hf,
    "no checkpoint of another run is loaded",
    "add --checkpoint.initial_load_path",
)
INITIAL_WEIGHTS = _when(
    lambda job: job.checkpoint.initial_load_path is not None,
    "no initial weights are loaded",
    "add --checkpoint.initial_load_path",
)
EXPORTS = _on("checkpoint.last_save_in_hf", "nothing is exported")

SPIKES = _when(
    lambda job: job.fault_tolerance.spike != "off",
    "loss spikes are not detected",
    "add --fault_tolerance.spike=warn",
)


def _policy(policy: str, why: str) -> Needs:
    """One of the two policies of [fault_tolerance] is `policy`."""
    keys = ("fault_tolerance.non_finite", "fault_tolerance.spike")
    return _when(
        lambda job: any(job.get(key) == policy for key in keys),
        why,
        " or ".join(f"add --{key}={policy}" if key is keys[0] else f"--{key}={policy}" for key in keys),
    )


SKIPS = _policy("skip", "no step is ever skipped")
REWINDS = _policy("rewind", "no step is ever rewound")

TRACES = _on("profiling.enable_profiling", "no traces are recorded")
SNAPSHOTS = _on("profiling.enable_memory_snapshot", "no memory snapshots are recorded")
PROFILES = _when(
    lambda job: job.profiling.enable_profiling or job.profiling.enable_memory_snapshot,
    "nothing is profiled",
    "add --profiling.enable_profiling or --profiling.enable_memory_snapshot",
)
REACHES_PROFILE = _when(
    _reaches_profile,
    "profiling.profile_freq exceeds training.steps, so no step is recorded",
    "lower --profiling.profile_freq",
)
TENSORBOARD = _on("metrics.enable_tensorboard", "no TensorBoard events are written")
VALIDATION = _on("validation.enable", "nothing is validated")

SEVERAL_READERS = _when(
    lambda job: job.training.num_workers <= 1 or job.training.dataset not in names.STREAMED_DATASETS,
    "a streamed dataset is read by one thread",
    "set it to 1, or to 0",
)
RECORDS = _when(_reads_records, "the shipped corpus has no bad records")
CHECKSUMS = _when(
    lambda job: job.training.dataset not in names.DATASETS,
    "only folders made by octavo prepare have checksums",
)
CHUNKS = Needs(_chunks, "a device has at most that many tokens in one pass", "lower it, or leave it out")
TORCHS_OPTIMIZER = _when(
    chooses_implementation,
    "it chooses among PyTorch's optimizers; octavo's own runs moments or weights of fewer bits",
)
_CHOOSE_STATE_DTYPE = " or ".join(row.name for row in OPTIMIZERS.values() if row.moment_bytes is None)
STATE_DTYPE = _when(
    lambda job: OPTIMIZERS[job.optimizer.name].moment_bytes is None,
    f"only {_CHOOSE_STATE_DTYPE} has a choice of state dtype",
    f"set --optimizer.name={_CHOOSE_STATE_DTYPE}",
)
COMPILES = _when(lambda job: job.compile.enable, "nothing is compiled", "add --training.compile")
SELECTIVE = _when(
    lambda job: job.activation_checkpoint.mode == "selective",
    "activation_checkpoint.mode is not selective",
    "add --activation_checkpoint.mode=selective",
)
DECAYS = _when(
    lambda job: job.lr_scheduler.decay_ratio != 0,
    "lr_scheduler.decay_ratio is 0, so the learning rate does not decay",
    "set --lr_scheduler.decay_ratio (None decays from the end of warm-up)",
)
WARMUP_ENDS = _when(
    lambda job: job.lr_scheduler.warmup_steps < (job.lr_scheduler.total_steps or job.training.steps),
    "warm-up takes all training.steps, so the learning rate does not decay",
    "lower --lr_scheduler.warmup_steps",
)

PIPELINE = _several("pipeline", "there is no pipeline")
BALANCED_STAGES = _when(
    lambda job: not job.parallelism.pipeline_parallel_split_points,
    "parallelism.pipeline_parallel_split_points sets where every stage begins",
    "leave one of the two out",
)
COUNTED_STAGES = _when(
    lambda job: job.parallelism.pipeline_parallel_schedule_csv is None,
    "parallelism.pipeline_parallel_schedule_csv has its own number of stages",
    "leave one of the two out",
)
SPLIT_LOGITS = _several("tensor", "there is no tensor parallelism, so every device has all logits")
SPLIT_PRODUCTS = _several("tensor", "there is no tensor parallelism, so there is nothing to overlap")
COMPILED_LAYERS = _when(
    lambda job: job.compile.enable and "model" in job.compile.components,
    "the compiler overlaps them, and the layers are not compiled",
    "add --training.compile",
)
SPLIT_SEQUENCES = _several(
    "context", "there is no context parallelism, so every device has all keys and values of its sequences"
)
SEVERAL_PROCESSES = Needs(
    lambda _, processes: processes > 1,
    "there is only one process",
    "run on several (NGPU=2 or more), or leave it out",
)
SHARDED = Needs(
    lambda job, processes: _layout(job, processes).sharded > 1,
    "parameters are not sharded, so none is gathered",
    "run on more processes, or lower --parallelism.tensor_parallel_degree",
)
