"""Flags that would have no effect.

Someone who types `--float8.recipe_name=rowwise` and forgets `--model.converters=float8` would train in
bfloat16 without knowing it. So a flag without effect is an error. The same setting in a TOML file is ignored,
because one file serves several commands. `NEEDS` states for each such key when it has an effect; keys that
are not in it always have one.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

from octavo.config import names
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError


@dataclass(frozen=True)
class Need:
    """`keys` (patterns of "section.key") have an effect only if `met(job, world_size)`; otherwise `why` and
    `remedy` make the message.
    """

    keys: tuple[str, ...]
    met: Callable[[JobConfig, int], bool]
    why: str
    remedy: str


def _profiles_nothing(job: JobConfig) -> bool:
    return not (job.profiling.enable_profiling or job.profiling.enable_memory_snapshot)


def _policies(job: JobConfig) -> tuple[str, str]:
    return job.fault_tolerance.non_finite, job.fault_tolerance.spike


def _layout(job: JobConfig, world_size: int) -> ParallelDims:
    """The job's degrees; if impossible, which another check reports, all processes shard one copy."""
    try:
        return parallel_dims_of(job.parallelism, world_size)
    except ConfigError:
        return ParallelDims(shard=world_size)


def casts_weights_again(job: JobConfig, world_size: int) -> bool:
    """Whether a float8 weight would be cast several times per step if its first cast were not kept: by
    several microbatches, by recomputation under activation checkpointing, or by gathers in float8.
    """
    layout = _layout(job, world_size)
    accumulates = job.training.global_batch_size > job.training.local_batch_size * layout.data
    if layout.pipeline > 1:
        accumulates |= job.training.local_batch_size > job.parallelism.pipeline_parallel_microbatch_size
    gathers = job.float8.enable_fsdp_float8_all_gather and world_size > 1
    return accumulates or gathers or job.activation_checkpoint.mode != "none"


def uses_previous_step(job: JobConfig) -> bool:
    """Whether some layer takes its scales from the previous step."""
    # Unreadable patterns are reported by another check.
    recipes = {job.float8.recipe_name, *(text.partition("=")[2].strip() for text in job.float8.layer_recipes)}
    return "float8" in job.model.converters and bool(recipes & set(names.PREVIOUS_STEP_RECIPES))


def fuses(job: JobConfig) -> bool:
    """Whether layers may be fused; with "auto" the device decides."""
    # Fused casts use the maxima of the current step.
    alone = job.parallelism.tensor_parallel_degree == 1 and not uses_previous_step(job)
    return job.model.fuse != "off" and alone


def _tokens_of_a_pass(job: JobConfig, world_size: int) -> int:
    training = job.training
    return training.local_batch_size * training.seq_len // _layout(job, world_size).context


def _streams_only(job: JobConfig) -> bool:
    return job.training.dataset in names.STREAMED_DATASETS


_VALIDATION = tuple(
    f"validation.{key}" for key in ("dataset", "dataset_path", "freq", "steps", "local_batch_size", "seq_len")
)


def _loads_by_name(job: JobConfig, _: int) -> bool:
    settings = job.checkpoint
    whole = settings.initial_load_path is not None and not settings.initial_load_model_only
    return whole or (settings.enable and settings.load_step >= 0)


_BALANCE = ("layers_per_stage", "first_stage_less_layers", "last_stage_less_layers")
_PIPELINE = ("schedule", "schedule_csv", "microbatch_size", "split_points")
_DECAY = ("lr_scheduler.decay_type", "lr_scheduler.min_lr_factor")
_PROFILING = "profiling.enable_profiling"

NEEDS: tuple[Need, ...] = (
    Need(
        ("float8.*",),
        lambda job, _: "float8" in job.model.converters,
        "the model is not converted to float8",
        'add --model.converters="float8"',
    ),
    Need(
        ("float8.max_saturated",),
        lambda job, _: uses_previous_step(job),
        "scales are computed from the current tensors, so nothing exceeds them",
        f"add --float8.recipe_name={names.PREVIOUS_STEP_RECIPES[0]}",
    ),
    Need(
        ("float8.precompute_float8_dynamic_scale_for_fsdp",),
        lambda job, _: job.float8.enable_fsdp_float8_all_gather,
        "weights are not gathered in float8",
        "add --float8.enable_fsdp_float8_all_gather",
    ),
    Need(
        ("float8.share_scales",),
        lambda job, _: (job.float8.recipe_name or names.RECIPES[0]) == "tensorwise",
        "only tensorwise has one scale per weight; other recipes join weights without it",
        "leave it out",
    ),
    Need(
        ("float8.share_scales",),
        lambda job, _: fuses(job),
        "nothing is fused",
        "set --model.fuse=on, and leave tensor parallelism out",
    ),
    Need(
        (
            "float8.health_tokens",
            "float8.health_max_flushed",
            "float8.health_max_saturated",
            "float8.health_min_sqnr",
        ),
        lambda job, _: job.float8.health_every > 0,
        "no step is measured",
        "add --float8.health_every",
    ),
    Need(
        ("float8.health_every",),
        lambda job, _: job.float8.health_every <= job.training.steps,
        "it exceeds training.steps, so no step is measured",
        "lower it",
    ),
    Need(
        ("float8.cast_weights_once",),
        casts_weights_again,
        "no weight is cast twice in a step: no accumulation, activation checkpointing or float8 gather",
        "leave it out",
    ),
    Need(
        (
            "checkpoint.folder",
            "checkpoint.interval",
            "checkpoint.load_step",
            "checkpoint.keep_latest_k",
            "checkpoint.last_save_model_only",
            "checkpoint.async_mode",
            "checkpoint.last_save_in_hf",
            "checkpoint.hash",
            "checkpoint.load_only",
            "checkpoint.create_seed_checkpoint",
            "checkpoint.max_failed_saves",
        ),
        lambda job, _: job.checkpoint.enable,
        "no checkpoints are saved or loaded",
        "add --checkpoint.enable",
    ),
    Need(
        ("checkpoint.exclude_from_loading",),
        _loads_by_name,
        "a run that resumes loads everything, so that it continues exactly",
        "name what to load: --checkpoint.load_step, or --checkpoint.initial_load_path with "
        "--checkpoint.no-initial_load_model_only",
    ),
    Need(
        ("checkpoint.initial_load_model_only",),
        lambda job, _: job.checkpoint.initial_load_path is not None and not job.checkpoint.initial_load_in_hf,
        "no checkpoint of another run is loaded",
        "add --checkpoint.initial_load_path",
    ),
    Need(
        ("checkpoint.initial_load_in_hf",),
        lambda job, _: job.checkpoint.initial_load_path is not None,
        "no initial weights are loaded",
        "add --checkpoint.initial_load_path",
    ),
    Need(
        ("checkpoint.export_dtype",),
        lambda job, _: job.checkpoint.last_save_in_hf,
        "nothing is exported",
        "add --checkpoint.last_save_in_hf",
    ),
    Need(
        ("fault_tolerance.spike_threshold", "fault_tolerance.spike_window"),
        lambda job, _: job.fault_tolerance.spike != "off",
        "loss spikes are not detected",
        "add --fault_tolerance.spike=warn",
    ),
    Need(
        ("fault_tolerance.max_skips",),
        lambda job, _: "skip" in _policies(job),
        "no step is ever skipped",
        "add --fault_tolerance.non_finite=skip or --fault_tolerance.spike=skip",
    ),
    Need(
        ("fault_tolerance.max_rewinds",),
        lambda job, _: "rewind" in _policies(job),
        "no step is ever rewound",
        "add --fault_tolerance.non_finite=rewind or --fault_tolerance.spike=rewind",
    ),
    Need(
        (
            "checkpoint.interval",
            "checkpoint.keep_latest_k",
            "checkpoint.last_save_model_only",
            "checkpoint.async_mode",
            "checkpoint.hash",
            "checkpoint.create_seed_checkpoint",
            "checkpoint.max_failed_saves",
        ),
        lambda job, _: not job.checkpoint.load_only,
        "checkpoint.load_only saves nothing",
        "leave one of the two out",
    ),
    Need(
        ("profiling.save_traces_folder",),
        lambda job, _: job.profiling.enable_profiling,
        "no traces are recorded",
        f"add --{_PROFILING}",
    ),
    Need(
        ("profiling.save_memory_snapshot_folder",),
        lambda job, _: job.profiling.enable_memory_snapshot,
        "no memory snapshots are recorded",
        "add --profiling.enable_memory_snapshot",
    ),
    Need(
        ("profiling.profile_freq",),
        lambda job, _: job.profiling.enable_profiling or job.profiling.enable_memory_snapshot,
        "nothing is profiled",
        f"add --{_PROFILING} or --profiling.enable_memory_snapshot",
    ),
    Need(
        (
            "profiling.enable_profiling",
            "profiling.enable_memory_snapshot",
            "profiling.profile_freq",
            "profiling.save_traces_folder",
            "profiling.save_memory_snapshot_folder",
        ),
        lambda job, _: _profiles_nothing(job) or job.profiling.profile_freq <= job.training.steps,
        "profiling.profile_freq exceeds training.steps, so no step is recorded",
        "lower --profiling.profile_freq",
    ),
    Need(
        ("metrics.save_tb_folder", "metrics.save_for_all_ranks"),
        lambda job, _: job.metrics.enable_tensorboard,
        "no TensorBoard events are written",
        "add --metrics.enable_tensorboard",
    ),
    Need(
        _VALIDATION,
        lambda job, _: job.validation.enable,
        "nothing is validated",
        "add --validation.enable",
    ),
    Need(
        ("training.num_workers",),
        lambda job, _: job.training.num_workers <= 1 or not _streams_only(job),
        "a streamed dataset is read by one thread",
        "set it to 1, or to 0",
    ),
    Need(
        ("training.max_bad_records",),
        lambda job, _: any(
            d not in (None, "shakespeare") for d in (job.training.dataset, job.validation.dataset)
        ),
        "the shipped corpus has no bad records",
        "leave it out",
    ),
    Need(
        ("training.loss_chunk_tokens",),
        lambda job, world_size: (
            job.training.loss_chunk_tokens is None
            or job.training.loss_chunk_tokens < _tokens_of_a_pass(job, world_size)
        ),
        "a device has at most that many tokens in one pass",
        "lower it, or leave it out",
    ),
    Need(
        ("optimizer.implementation",),
        lambda job, _: (
            job.optimizer.name == "Adam"
            or (
                job.optimizer.name == "AdamW" and job.optimizer.state_dtype == job.training.dtype == "float32"
            )
        ),
        "it chooses among PyTorch's optimizers; octavo's own runs moments or weights of fewer bits",
        "leave it out",
    ),
    Need(
        ("optimizer.state_dtype",),
        lambda job, _: job.optimizer.name == "AdamW",
        "only AdamW has a choice of state dtype",
        "set --optimizer.name=AdamW",
    ),
    Need(
        ("training.verify_data",),
        lambda job, _: job.training.dataset not in names.DATASETS,
        "only folders made by octavo prepare have checksums",
        "leave it out",
    ),
    Need(
        ("compile.components",),
        lambda job, _: job.compile.enable,
        "nothing is compiled",
        "add --training.compile",
    ),
    Need(
        ("activation_checkpoint.selective_ac_option",),
        lambda job, _: job.activation_checkpoint.mode == "selective",
        "activation_checkpoint.mode is not selective",
        "add --activation_checkpoint.mode=selective",
    ),
    Need(
        _DECAY,
        lambda job, _: job.lr_scheduler.decay_ratio != 0,
        "lr_scheduler.decay_ratio is 0, so the learning rate does not decay",
        "set --lr_scheduler.decay_ratio (None decays from the end of warm-up)",
    ),
    Need(
        (*_DECAY, "lr_scheduler.decay_ratio"),
        lambda job, _: job.lr_scheduler.warmup_steps < job.training.steps,
        "warm-up takes all training.steps, so the learning rate does not decay",
        "lower --lr_scheduler.warmup_steps",
    ),
    Need(
        tuple(f"parallelism.pipeline_parallel_{key}" for key in (*_BALANCE, *_PIPELINE)),
        lambda job, _: job.parallelism.pipeline_parallel_degree > 1,
        "there is no pipeline",
        "add --parallelism.pipeline_parallel_degree",
    ),
    Need(
        tuple(f"parallelism.pipeline_parallel_{key}" for key in _BALANCE),
        lambda job, _: not job.parallelism.pipeline_parallel_split_points,
        "parallelism.pipeline_parallel_split_points sets where every stage begins",
        "leave one of the two out",
    ),
    Need(
        ("parallelism.pipeline_parallel_layers_per_stage",),
        lambda job, _: job.parallelism.pipeline_parallel_schedule_csv is None,
        "parallelism.pipeline_parallel_schedule_csv has its own number of stages",
        "leave one of the two out",
    ),
    Need(
        ("parallelism.disable_loss_parallel",),
        lambda job, _: job.parallelism.tensor_parallel_degree > 1,
        "there is no tensor parallelism, so every device has all logits",
        "add --parallelism.tensor_parallel_degree",
    ),
    Need(
        ("parallelism.enable_async_tensor_parallel",),
        lambda job, _: job.parallelism.tensor_parallel_degree > 1,
        "there is no tensor parallelism, so there is nothing to overlap",
        "add --parallelism.tensor_parallel_degree",
    ),
    Need(
        ("parallelism.enable_async_tensor_parallel",),
        lambda job, _: job.compile.enable and "model" in job.compile.components,
        "the compiler overlaps them, and the layers are not compiled",
        "add --training.compile",
    ),
    Need(
        ("parallelism.context_parallel_rotate_method",),
        lambda job, _: job.parallelism.context_parallel_degree > 1,
        "there is no context parallelism, so every device has all keys and values of its sequences",
        "add --parallelism.context_parallel_degree",
    ),
    Need(
        (
            "float8.enable_fsdp_float8_all_gather",
            "float8.precompute_float8_dynamic_scale_for_fsdp",
            "parallelism.fsdp_reshard_after_forward",
            "training.mixed_precision_reduce",
            "comm.init_timeout_seconds",
            "comm.train_timeout_seconds",
        ),
        lambda _, world_size: world_size > 1,
        "there is only one process",
        "run on several (NGPU=2 or more), or leave it out",
    ),
    Need(
        (
            "float8.enable_fsdp_float8_all_gather",
            "float8.precompute_float8_dynamic_scale_for_fsdp",
            "parallelism.fsdp_reshard_after_forward",
        ),
        lambda job, world_size: _layout(job, world_size).sharded > 1,
        "parameters are not sharded, so none is gathered",
        "run on more processes, or lower --parallelism.tensor_parallel_degree",
    ),
)


def without_effect(job: JobConfig, world_size: int) -> list[str]:
    """One message for each flag on the command line that has no effect."""
    problems = []
    for key, source in job.given.items():
        unmet = [need for need in NEEDS if _covers(need, key) and not need.met(job, world_size)]
        if source == "cli" and unmet:
            problems.append(f"{job.where[key]} would have no effect: {unmet[0].why}; {unmet[0].remedy}")
    return problems


def _covers(need: Need, key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in need.keys)
