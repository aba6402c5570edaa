"""Flags that would have no effect are errors, which name what gives them one."""

from pathlib import Path

import pytest

from octavo.config import JobConfig
from octavo.config.option_checks import without_effect
from octavo.config.schema import OPTIONS
from tests.config.judged import problems

# flag | part of the message | flags with which it has an effect | processes
ALONE = """
--float8.recipe_name=rowwise | --model.converters="float8" | --model.converters=float8 | 1
--float8.filter_fqns=output | --model.converters="float8" | --model.converters=float8 | 1
--float8.emulate | --model.converters="float8" | --model.converters=float8 | 1
--float8.enable_fsdp_float8_all_gather | --model.converters | --model.converters=float8 | 2
--checkpoint.folder=x | --checkpoint.enable | --checkpoint.enable_checkpoint | 1
--checkpoint.interval=5 | --checkpoint.enable | --checkpoint.enable | 1
--checkpoint.load_step=-1 | --checkpoint.enable | --checkpoint.enable | 1
--checkpoint.keep_latest_k=3 | --checkpoint.enable | --checkpoint.enable | 1
--checkpoint.last_save_model_only | --checkpoint.enable | --checkpoint.enable | 1
--checkpoint.last_save_in_hf | --checkpoint.enable | --checkpoint.enable | 1
--checkpoint.export_dtype=bfloat16 | last_save_in_hf | --checkpoint.enable --checkpoint.last_save_in_hf | 1
--checkpoint.async_mode=async | --checkpoint.enable | --checkpoint.enable | 1
--profiling.save_traces_folder=x | enable_profiling | --profiling.enable_profiling | 1
--profiling.profile_freq=5 | enable_profiling | --profiling.enable_profiling | 1
--profiling.profile_freq=5 | enable_memory_snapshot | --profiling.enable_memory_snapshot | 1
--profiling.save_memory_snapshot_folder=x | enable_memory_snapshot | --profiling.enable_memory_snapshot | 1
--metrics.save_tb_folder=x | enable_tensorboard | --metrics.enable_tensorboard | 1
--metrics.save_for_all_ranks | enable_tensorboard | --metrics.enable_tensorboard | 1
--compile.components=loss | --training.compile | --training.compile | 1
--parallelism.fsdp_reshard_after_forward=never | NGPU=2 | | 2
--training.mixed_precision_reduce=float32 | NGPU=2 | | 2
--comm.init_timeout_seconds=9 | NGPU=2 | | 2
--comm.train_timeout_seconds=9 | NGPU=2 | | 2
"""
PARALLEL = "--parallelism.tensor_parallel_degree=2"
GATHER = "--model.converters=float8 --float8.enable_fsdp_float8_all_gather"
ROWS = [
    *([part.strip() for part in line.split("|")] for line in ALONE.strip().splitlines()),
    ("--parallelism.enable_async_tensor_parallel", PARALLEL[:-2], f"{PARALLEL} --training.compile", "2"),
    (
        "--parallelism.context_parallel_rotate_method=alltoall",
        "--parallelism.context_parallel_degree",
        "--parallelism.context_parallel_degree=2",
        "2",
    ),
    ("--float8.precompute_float8_dynamic_scale_for_fsdp", "--model.converters", GATHER, "2"),
]


@pytest.mark.parametrize(("flag", "remedy", "cure", "processes"), ROWS)
def test_a_flag_without_effect(flag: str, remedy: str, cure: str, processes: str) -> None:
    told = problems(flag)
    assert told.startswith(f"{flag.partition('=')[0]} would have no effect: ")
    assert remedy in told
    assert problems(flag, *cure.split(), world_size=int(processes)) == ""


# flag | part of the message | flag with which it has none
BESIDE_ANOTHER = """
--activation_checkpoint.selective_ac_option=2 | mode | --activation_checkpoint.mode=full
--lr_scheduler.decay_type=sqrt | decay_ratio is 0 | --lr_scheduler.decay_ratio=0
--lr_scheduler.min_lr_factor=0.1 | decay_ratio is 0 | --lr_scheduler.decay_ratio=0
--lr_scheduler.decay_ratio=0.5 | warm-up takes all | --lr_scheduler.warmup_steps=300
--profiling.enable_profiling | lower --profiling.profile_freq | --training.steps=9
--profiling.profile_freq=300 | exceeds training.steps | --training.steps=299
--profiling.save_traces_folder=x | no step is recorded | --training.steps=9
"""


@pytest.mark.parametrize("row", BESIDE_ANOTHER.strip().splitlines())
def test_a_flag_without_effect_because_of_another(row: str) -> None:
    flag, remedy, context = (part.strip() for part in row.split("|"))
    prepared = ["--profiling.enable_profiling"] if flag.startswith("--profiling") else []
    assert problems(flag, *prepared) == ""
    assert remedy in problems(flag, *prepared, context)


@pytest.mark.parametrize("flag", ["--float8.cast_weights_once", "--float8.no-cast_weights_once"])
def test_casting_once_matters_only_where_weights_are_cast_again(flag: str) -> None:
    once = [flag, "--model.converters=float8", "--activation_checkpoint.mode=none"]
    assert problems(*once).startswith(f"{flag} would have no effect: no weight is cast twice in a step")
    assert "would have no effect" in problems(*once, "--training.global_batch_size=8")
    assert "would have no effect" in problems(*once, "--training.global_batch_size=16", world_size=2)
    assert problems(*once, "--training.global_batch_size=16") == ""
    assert problems(*once, "--activation_checkpoint.mode=full") == ""
    assert problems(*once, "--float8.enable_fsdp_float8_all_gather", world_size=2) == ""


def test_a_format_matters_only_where_something_is_loaded() -> None:
    told = problems("--checkpoint.initial_load_in_hf")
    assert told.startswith("--checkpoint.initial_load_in_hf would have no effect: no initial weights")
    assert "add --checkpoint.initial_load_path" in told


def test_a_setting_without_effect_is_inert_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        "[float8]\nrecipe_name = 'rowwise'\nfilter_fqns = ['output']\n"
        "[checkpoint]\ninterval = 5\n[compile]\ncomponents = ['loss']\n[comm]\ntrain_timeout_seconds = 9\n"
    )
    assert problems("--config_file=x.toml") == ""
    assert "--float8.emulate would have no effect" in problems("--config_file=x.toml", "--float8.emulate")


def test_switches_themselves_always_have_an_effect() -> None:
    job = JobConfig()
    job.given = dict.fromkeys(OPTIONS, "cli")
    job.where = {name: name for name in OPTIONS}
    job.lr_scheduler.decay_ratio = 0.0
    job.activation_checkpoint.mode = "none"
    useless = {problem.key for problem in without_effect(job, 1)}
    assert "checkpoint.interval" in useless
    switches = {"checkpoint.enable", "compile.enable", "profiling.enable_profiling", "model.converters"}
    assert not useless & switches
