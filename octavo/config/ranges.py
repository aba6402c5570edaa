"""The ranges of values: one row per rule, in the words of its message."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.config.schema import JobConfig
from octavo.config.values import digits


@dataclass(frozen=True)
class Rule:
    """What the values of some keys must be. None (unset) passes."""

    keys: tuple[str, ...]
    holds: Callable[[Any], bool]
    must: str


def _within(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


def _above_0(high: float) -> Callable[[float], bool]:
    return lambda value: 0 < value <= high


_MOST = 2**31 - 1
"""The largest value of every integer but the seed. No job comes near it, and products of two fit in 64 bits.
"""

_STEEPEST = 1e3
"""The largest factor of a weight or its update per step: one step at this rate destroys any model."""

_UNCLIPPED = 1e30
"""A norm that never clips. Clipping divides it by as little as 1e-6, and float32 must hold the result."""

_PATHS = (
    "job.dump_folder",
    "checkpoint.folder",
    "profiling.save_traces_folder",
    "profiling.save_memory_snapshot_folder",
    "metrics.save_tb_folder",
    "model.hf_assets_path",
    "training.dataset",
    "validation.dataset",
)

RULES: tuple[Rule, ...] = (
    Rule(
        (
            "training.seq_len",
            "training.steps",
            "training.local_batch_size",
            "training.gc_freq",
            "training.loss_chunk_tokens",
            "metrics.log_freq",
            "profiling.profile_freq",
            "checkpoint.interval",
            "validation.freq",
            "validation.local_batch_size",
            "validation.seq_len",
            "checkpoint.max_failed_saves",
            "parallelism.data_parallel_replicate_degree",
            "parallelism.tensor_parallel_degree",
            "parallelism.context_parallel_degree",
            "parallelism.pipeline_parallel_degree",
            "parallelism.pipeline_parallel_microbatch_size",
            "parallelism.pipeline_parallel_layers_per_stage",
            "comm.init_timeout_seconds",
            "comm.train_timeout_seconds",
            "fault_tolerance.max_skips",
            "fault_tolerance.max_rewinds",
        ),
        _within(1, _MOST),
        f"must be at least 1 and at most {_MOST}",
    ),
    Rule(
        ("training.global_batch_size", "parallelism.data_parallel_shard_degree"),
        lambda value: value == -1 or 1 <= value <= _MOST,
        f"must be at least 1, or -1 to derive it from the number of devices, and at most {_MOST}",
    ),
    Rule(("training.seed", "training.data_seed"), _within(0, 2**63 - 1), "must be between 0 and 2^63 - 1"),
    Rule(
        (
            "lr_scheduler.warmup_steps",
            "training.max_bad_records",
            "float8.health_every",
            "float8.health_tokens",
            "parallelism.pipeline_parallel_first_stage_less_layers",
            "parallelism.pipeline_parallel_last_stage_less_layers",
        ),
        _within(0, _MOST),
        f"must be at least 0 and at most {_MOST}",
    ),
    Rule(
        ("float8.health_max_flushed", "float8.health_max_saturated"),
        _within(0, 100),
        "must be a percentage, between 0 and 100",
    ),
    Rule(("float8.health_min_sqnr",), _within(-100, 100), "must be decibels between -100 and 100"),
    Rule(("training.num_workers",), _within(0, 64), "must be at least 0 and at most 64"),
    Rule(
        ("validation.steps",),
        lambda value: value == -1 or 1 <= value <= _MOST,
        f"must be at least 1, or -1 for every sample once, and at most {_MOST}",
    ),
    Rule(("validation.fraction",), _within(0, 0.5), "must be between 0 and 0.5"),
    Rule(
        ("fault_tolerance.spike_window",),
        _within(5, _MOST),
        f"must be at least 5, for statistics, and at most {_MOST}",
    ),
    Rule(
        ("fault_tolerance.spike_threshold",),
        _above_0(_STEEPEST),
        f"must be a finite number above 0, at most {_STEEPEST:g}",
    ),
    Rule(
        ("checkpoint.load_step",),
        _within(-1, _MOST),
        f"must be a step, or -1 for the latest, and at most {_MOST}",
    ),
    Rule(
        ("checkpoint.keep_latest_k",),
        lambda value: value == 0 or 2 <= value <= _MOST,
        f"must be 0 (keep all), or at least 2 (one remains while the next is written) and at most {_MOST}",
    ),
    Rule(
        ("optimizer.lr", "optimizer.eps"),
        _above_0(_STEEPEST),
        f"must be a finite number above 0, at most {_STEEPEST:g}",
    ),
    Rule(
        ("training.max_norm",),
        _above_0(_UNCLIPPED),
        f"must be a finite number above 0, at most {_UNCLIPPED:g}",
    ),
    Rule(
        ("optimizer.weight_decay",),
        _within(0, _STEEPEST),
        f"must be a finite number, at least 0 and at most {_STEEPEST:g}",
    ),
    Rule(
        ("optimizer.beta1", "optimizer.beta2"), lambda value: 0 <= value < 1, "must be at least 0 and below 1"
    ),
    Rule(
        ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor", "float8.max_saturated"),
        _within(0, 1),
        "must be between 0 and 1",
    ),
    Rule(
        ("activation_checkpoint.selective_ac_option",),
        lambda value: value == "op" or re.fullmatch("0*[1-9][0-9]{0,5}", value) is not None,
        'must be "op" or a whole number from 1 to 999999, as a string',
    ),
    Rule(
        (
            *_PATHS,
            "training.dataset_path",
            "validation.dataset_path",
            "checkpoint.initial_load_path",
            "parallelism.pipeline_parallel_schedule_csv",
        ),
        lambda value: "\0" not in value,
        "must not contain a NUL character: no path can",
    ),
    Rule(
        _PATHS,
        lambda value: bool(value.strip()),
        "must not be empty",
    ),
    Rule(
        ("compile.components",),
        lambda value: len(value) > 0,
        "must name something to compile; --compile.no-enable turns compilation off",
    ),
)


def get(job: JobConfig, key: str) -> Any:
    """The value of "section.key"."""
    section, _, name = key.partition(".")
    return getattr(getattr(job, section), name)


def shown(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return digits(value)
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def named(job: JobConfig, key: str) -> str:
    """A key with its value and its origin (file and line, or flag), to begin a message with."""
    where, setting = job.where.get(key), f"{key} = {shown(get(job, key))}"
    if where is None:
        return f"{setting} (the default)"
    return f"{setting} ({where})"


def out_of_range(job: JobConfig) -> list[str]:
    """One message for each value out of range."""
    return [
        f"{named(job, key)} {rule.must}"
        for rule in RULES
        for key in rule.keys
        if get(job, key) is not None and not rule.holds(get(job, key))
    ]
