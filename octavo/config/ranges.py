"""Which values make sense: one row a key, in the words that the message uses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.config.schema import JobConfig


@dataclass(frozen=True)
class Rule:
    """What the value of some keys must be. Keys whose value is None (unset) are not judged."""

    keys: tuple[str, ...]
    holds: Callable[[Any], bool]
    must: str


def _within(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


RULES: tuple[Rule, ...] = (
    Rule(
        (
            "training.seq_len",
            "training.steps",
            "training.local_batch_size",
            "training.gc_freq",
            "metrics.log_freq",
            "profiling.profile_freq",
            "checkpoint.interval",
            "parallelism.data_parallel_replicate_degree",
            "comm.init_timeout_seconds",
            "comm.train_timeout_seconds",
        ),
        lambda value: value >= 1,
        "must be at least 1",
    ),
    Rule(
        ("training.global_batch_size", "parallelism.data_parallel_shard_degree"),
        lambda value: value == -1 or value >= 1,
        "must be at least 1, or -1 for what the number of devices gives",
    ),
    Rule(("training.seed",), _within(0, 2**63 - 1), "must be between 0 and 2^63 - 1"),
    Rule(("lr_scheduler.warmup_steps",), lambda value: value >= 0, "must be at least 0"),
    Rule(("checkpoint.load_step",), lambda value: value >= -1, "must be a step, or -1 for the latest"),
    Rule(
        ("checkpoint.keep_latest_k",),
        lambda value: value == 0 or value >= 2,
        "must be 0 (keep all) or at least 2: one must be left while the next is written",
    ),
    Rule(
        ("optimizer.lr", "optimizer.eps", "training.max_norm"),
        lambda value: math.isfinite(value) and value > 0,
        "must be a finite number above 0",
    ),
    Rule(
        ("optimizer.weight_decay",),
        lambda value: math.isfinite(value) and value >= 0,
        "must be a finite number, at least 0",
    ),
    Rule(
        ("optimizer.beta1", "optimizer.beta2"), lambda value: 0 <= value < 1, "must be at least 0 and below 1"
    ),
    Rule(
        ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor"), _within(0, 1), "must be between 0 and 1"
    ),
    Rule(
        ("activation_checkpoint.selective_ac_option",),
        lambda value: value == "op" or (value.isascii() and value.isdigit() and int(value) >= 1),
        'must be "op" or a positive whole number, as a string',
    ),
    Rule(
        (
            "job.dump_folder",
            "checkpoint.folder",
            "profiling.save_traces_folder",
            "profiling.save_memory_snapshot_folder",
            "metrics.save_tb_folder",
            "model.hf_assets_path",
            "training.dataset",
        ),
        lambda value: bool(value.strip()) and "\0" not in value,
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
    """A value as its user would write it."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def named(job: JobConfig, key: str) -> str:
    """A key with its value and where that came from, to begin a message with."""
    where, setting = job.where.get(key), f"{key} = {shown(get(job, key))}"
    if where is None:
        return f"{setting} (the default)"
    return f"{setting} ({where})"


def out_of_range(job: JobConfig) -> list[str]:
    """One message for each value that cannot be meant."""
    return [
        f"{named(job, key)} {rule.must}"
        for rule in RULES
        for key in rule.keys
        if get(job, key) is not None and not rule.holds(get(job, key))
    ]
