"""Values out of range: the message has the value, the limit and where it was given."""

from pathlib import Path

import pytest

from octavo.config import ConfigError, load
from octavo.config.options import Option
from octavo.config.ranges import Range
from octavo.config.schema import OPTIONS
from octavo.config.values import unwrap
from octavo.preflight import check
from tests.config.judged import problems

BAD_VALUES = [
    ("training.seq_len", "0", "must be at least 1"),
    ("training.seq_len", "-5", "must be at least 1"),
    ("training.steps", "0", "must be at least 1"),
    ("training.local_batch_size", "0", "must be at least 1"),
    ("training.gc_freq", "0", "must be at least 1"),
    ("training.global_batch_size", "0", "must be at least 1, or -1"),
    ("training.global_batch_size", "-2", "must be at least 1, or -1"),
    ("training.max_norm", "0", "above 0"),
    ("training.max_norm", "inf", "finite"),
    ("training.seed", "-1", "between 0 and"),
    ("training.seed", str(2**63), "between 0 and"),
    ("training.dataset", "", "must not be empty"),
    ("metrics.log_freq", "0", "must be at least 1"),
    ("optimizer.lr", "0", "above 0"),
    ("optimizer.lr", "-1e-3", "above 0"),
    ("optimizer.lr", "nan", "finite"),
    ("optimizer.lr", "1e999", "finite"),
    ("optimizer.eps", "0", "above 0"),
    ("optimizer.beta1", "1", "below 1"),
    ("optimizer.beta2", "-0.1", "at least 0"),
    ("optimizer.beta2", "nan", "at least 0"),
    ("optimizer.weight_decay", "-1", "at least 0"),
    ("lr_scheduler.warmup_steps", "-1", "at least 0"),
    ("lr_scheduler.decay_ratio", "1.5", "between 0 and 1"),
    ("lr_scheduler.min_lr_factor", "-0.5", "between 0 and 1"),
    ("parallelism.data_parallel_replicate_degree", "0", "at least 1"),
    ("parallelism.data_parallel_shard_degree", "0", "at least 1, or -1"),
    ("job.dump_folder", " ", "must not be empty"),
    ("training.local_batch_size", "99999999999999999999", "at most 2147483647"),
    ("training.global_batch_size", str(2**31), "at most 2147483647"),
    ("training.steps", "9" * 500, "at most 2147483647"),
    ("training.seed", "9" * 500, "between 0 and 2^63 - 1"),
    ("optimizer.lr", "1e40", "at most 1000"),
    ("optimizer.eps", "1e40", "at most 1000"),
    ("optimizer.weight_decay", "1e300", "at most 1000"),
    ("optimizer.weight_decay", "nan", "finite"),
    ("training.max_norm", "1e40", "at most 1e+30"),
    ("model.hf_assets_path", "", "must not be empty"),
]


@pytest.mark.parametrize(("key", "value", "must"), BAD_VALUES)
def test_value_out_of_range(key: str, value: str, must: str) -> None:
    told = problems(f"--{key}={value}")
    assert told.startswith(f"{key} = ")
    assert f"(--{key})" in told
    assert must in told
    assert len(told.splitlines()) == 1


ACTIVE_BAD_VALUES = [
    (["--checkpoint.enable", "--checkpoint.interval=0"], "checkpoint.interval = 0"),
    (["--checkpoint.enable", "--checkpoint.keep_latest_k=1"], "checkpoint.keep_latest_k = 1"),
    (["--checkpoint.enable", "--checkpoint.keep_latest_k=-1"], "checkpoint.keep_latest_k = -1"),
    (["--checkpoint.enable", "--checkpoint.load_step=-2"], "checkpoint.load_step = -2"),
    (["--checkpoint.enable", "--checkpoint.folder="], "checkpoint.folder = "),
    (["--profiling.enable_profiling", "--profiling.profile_freq=0"], "profiling.profile_freq = 0"),
    (["--activation_checkpoint.selective_ac_option=0"], "selective_ac_option = 0"),
    (["--activation_checkpoint.selective_ac_option=ops"], 'must be "op" or a whole number from 1'),
    (["--activation_checkpoint.selective_ac_option=" + "9" * 5000], 'must be "op" or a whole number from 1'),
    (["--training.compile", "--compile.components="], "must name something to compile"),
]


@pytest.mark.parametrize(("argv", "part"), ACTIVE_BAD_VALUES)
def test_value_out_of_range_of_an_active_section(argv: list[str], part: str) -> None:
    assert part in problems(*argv)
    assert len(problems(*argv).splitlines()) == 1


NUMBERS = [option for option in OPTIONS.values() if unwrap(option.kind)[0] in (int, float)]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_every_number_has_a_range_and_a_whole_number_an_upper_bound(option: Option) -> None:
    ranges = option.noted(Range)
    assert ranges
    if unwrap(option.kind)[0] is int:
        most = {"seed": 2**63 - 1, "data_seed": 2**63 - 1, "num_workers": 64}.get(option.key, 2**31 - 1)
        assert all(note.holds(most) for note in ranges)
        assert not all(note.holds(most + 1) for note in ranges)


def test_a_number_too_long_to_print_is_told_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f"[training]\nsteps = 0x{'f' * 5000}\n")
    assert problems("--config_file=x.toml", "--training.seq_len=8").count("\n") == 0
    job = load(["--config_file=x.toml"])
    assert job.training.steps == 16**5000 - 1
    with pytest.raises(
        ConfigError, match=r"^training.steps = about 10\^6020 \(x.toml:2\) must be at least 1"
    ):
        check(job, world_size=1)


@pytest.mark.parametrize("key", ["job.dump_folder", "training.dataset", "training.dataset_path"])
def test_a_path_with_a_nul_character_is_told_as_that(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    (tmp_path / "x.toml").write_text(f'[{section}]\n{name} = "a\\u0000b"\n')
    told = problems("--config_file=x.toml")
    assert told == rf"{key} = 'a\x00b' (x.toml:2) must not contain a NUL character: no path can"


def test_a_value_from_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[training]\nseq_len = 0\n")
    with pytest.raises(
        ConfigError, match=r"^training.seq_len = 0 \(x.toml:2\) must be at least 1 and at most 2147483647$"
    ):
        check(load(["--config_file=x.toml"]), world_size=1)
