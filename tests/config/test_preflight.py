"""What `check` refuses, and that its message has the value, the limit and the remedy."""

import dataclasses
import sys
from pathlib import Path

import pytest

from octavo.config import ConfigError, JobConfig, check, load, notes
from octavo.config.effects import NEEDS, without_effect
from octavo.config.programs import octavo_command
from octavo.config.ranges import RULES, get
from octavo.config.schema import SECTIONS

COMMON = ["--training.steps=300", "--training.seq_len=64"]


def problems(*argv: str, world_size: int = 1, gpus: int | None = None) -> str:
    """The message that `check` ends in, empty where the job is in order."""
    try:
        check(load([*COMMON, *argv]), world_size=world_size, gpus=gpus)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_in_order() -> None:
    check(JobConfig(), world_size=1, gpus=0)
    check(JobConfig(), world_size=8, gpus=8)


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


def test_ranges_name_keys_that_exist() -> None:
    for rule in RULES:
        for key in rule.keys:
            section, _, name = key.partition(".")
            assert name in SECTIONS[section]


@pytest.mark.parametrize(
    "key",
    [f"{section}.{key}" for section, keys in SECTIONS.items() for key, kind in keys.items() if kind is int],
)
def test_every_whole_number_has_an_upper_bound(key: str) -> None:
    most = {"training.seed": 2**63 - 1, "training.num_workers": 64}.get(key, 2**31 - 1)
    rules = [rule for rule in RULES if key in rule.keys]
    assert all(rule.holds(most) for rule in rules)
    assert not all(rule.holds(most + 1) for rule in rules)


def test_a_number_too_long_to_print_is_told_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f"[training]\nsteps = 0x{'f' * 5000}\n")
    assert problems("--config_file=x.toml", "--training.seq_len=8").count("\n") == 0
    job = load(["--config_file=x.toml"])
    assert get(job, "training.steps") == 16**5000 - 1
    with pytest.raises(
        ConfigError, match=r"^training.steps = about 10\^6020 \(x.toml:2\) must be at least 1"
    ):
        check(job, world_size=1)


@pytest.mark.parametrize("key", ["job.dump_folder", "training.dataset", "training.dataset_path"])
def test_a_path_with_a_nul_character_is_told_as_that(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    (tmp_path / "x.toml").write_text(f'[{section}]\n{name} = "a\\u0000b"\n')
    told = problems("--config_file=x.toml")
    assert told == rf"{key} = 'a\x00b' (x.toml:2) must not contain a NUL character, which no path can"


def test_every_number_has_a_range() -> None:
    ranged = {key for rule in RULES for key in rule.keys}
    numbers = {
        f"{section}.{key}"
        for section, keys in SECTIONS.items()
        for key, kind in keys.items()
        if kind in (int, float, float | None)
    }
    assert numbers <= ranged


def test_a_value_from_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[training]\nseq_len = 0\n")
    with pytest.raises(
        ConfigError, match=r"^training.seq_len = 0 \(x.toml:2\) must be at least 1 and at most 2147483647$"
    ):
        check(load(["--config_file=x.toml"]), world_size=1)


@pytest.mark.parametrize(
    ("argv", "world_size", "parts"),
    [
        (["--training.global_batch_size=16"], 3, ["8 x 3 = 24", "24 would be"]),
        (["--training.global_batch_size=40"], 3, ["8 x 3 = 24", "24 or 48 would be"]),
        (["--training.global_batch_size=4"], 1, ["8 x 1 = 8"]),
        (["--training.local_batch_size=3", "--training.global_batch_size=8"], 2, ["3 x 2 = 6", "6 or 12"]),
        (
            ["--parallelism.data_parallel_shard_degree=4"],
            2,
            ["data_parallel_shard_degree = 4", "2 processes"],
        ),
        (["--parallelism.data_parallel_replicate_degree=3"], 4, ["= 3", "does not divide 4 processes"]),
        (
            [
                "--parallelism.data_parallel_replicate_degree=2",
                "--parallelism.data_parallel_shard_degree=2",
            ],
            8,
            ["2 x 2 = 4", "8 processes"],
        ),
        (
            ["--parallelism.tensor_parallel_degree=2", "--parallelism.context_parallel_degree=3"],
            4,
            ["context_parallel_degree x tensor_parallel_degree = 3 x 2 = 6 does not divide 4 processes"],
        ),
        (["--parallelism.tensor_parallel_degree=2"], 1, ["= 2 does not divide 1 process"]),
        (
            ["--parallelism.tensor_parallel_degree=2", "--training.global_batch_size=12"],
            4,
            ["local_batch_size x data parallel groups = 8 x 2 = 16"],
        ),
        (
            [
                "--parallelism.tensor_parallel_degree=2",
                "--parallelism.context_parallel_degree=2",
                "--training.seq_len=100",
            ],
            4,
            ["tensor_parallel_degree = 2 times 2 x context_parallel_degree = 4", "96 or 104 would be"],
        ),
    ],
)
def test_arithmetic_that_does_not_come_out(argv: list[str], world_size: int, parts: list[str]) -> None:
    told = problems(*argv, world_size=world_size)
    assert all(part in told for part in parts), told


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        (["--training.global_batch_size=48"], 3),
        (["--parallelism.data_parallel_replicate_degree=2"], 8),
        (["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=4"], 8),
        (["--parallelism.data_parallel_shard_degree=8"], 8),
        (["--parallelism.tensor_parallel_degree=2", "--training.global_batch_size=16"], 4),
        (["--parallelism.tensor_parallel_degree=2", "--parallelism.context_parallel_degree=2"], 8),
    ],
)
def test_arithmetic_that_comes_out(argv: list[str], world_size: int) -> None:
    assert problems(*argv, world_size=world_size) == ""


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model.name=llama"], ["no such model", "did you mean 'llama3'?"]),
        (["--model.flavor=8b"], ["llama3 has no such flavor", "did you mean '8B'?"]),
        (["--training.dataset=shakespear"], ["neither a known corpus", "did you mean 'shakespeare'?"]),
        (["--training.dataset=./no/such"], ["training.dataset = ./no/such", "nor an existing path"]),
        (["--training.dataset_path=x"], ["has no effect with training.dataset = shakespeare"]),
        (
            ["--training.dataset=c4", "--training.dataset_path=./no"],
            ["dataset_path = ./no", "does not exist"],
        ),
        (["--model.hf_assets_path=octavo_bpe"], ["no such tokenizer; did you mean 'octavo_bpe_2048'?"]),
        (["--lr_scheduler.warmup_steps=301"], ["exceeds training.steps = 300"]),
        (
            ["--experimental.custom_import=no_such_module"],
            ["custom_import = no_such_module", "no such module"],
        ),
        (["--experimental.custom_import=a/b.py"], ["dotted module name"]),
        (["--experimental.custom_import=json.nothing"], ["no such module"]),
        (["--experimental.custom_import=json.py"], ["a module's name, not its file's: json"]),
        (["--experimental.custom_import=json.decoder.more"], ["no such module"]),
    ],
)
def test_name_that_does_not_exist(argv: list[str], parts: list[str]) -> None:
    told = problems(*argv)
    assert all(part in told for part in parts), told


@pytest.mark.parametrize("key", ["training.dataset", "model.hf_assets_path", "job.dump_folder"])
@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/x"])
def test_a_path_that_cannot_be(key: str, path: str) -> None:
    assert problems(f"--{key}={path}").startswith(f"{key} = {path} (--{key}): ")


def test_missing_tokenizer_is_told_with_the_command_that_fetches_it() -> None:
    told = problems("--model.hf_assets_path=./assets/hf/Llama-3.1-8B")
    assert "model.hf_assets_path = ./assets/hf/Llama-3.1-8B" in told
    assert told.endswith(
        f"fetch it: {octavo_command()} download --repo_id meta-llama/Llama-3.1-8B --assets tokenizer"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"])
def test_a_folder_with_a_tokenizer_will_do(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "some"
    assert "no such tokenizer" in problems("--model.hf_assets_path=some")
    (folder / name).parent.mkdir(parents=True)
    assert "the folder has none of tokenizer.json" in problems("--model.hf_assets_path=some")
    (folder / name).write_text("{}")
    assert problems("--model.hf_assets_path=some") == ""
    assert problems(f"--model.hf_assets_path=some/{name}") == ""


def test_a_local_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "notes.pdf").write_text("x")
    assert "training.dataset = texts" in problems("--training.dataset=texts")
    assert "training.dataset = texts/notes.pdf" in problems("--training.dataset=texts/notes.pdf")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "a.jsonl").write_text("{}")
    assert problems("--training.dataset=texts") == ""
    assert problems("--training.dataset=texts/deeper/a.jsonl") == ""


def test_a_custom_import_is_found_but_not_imported(tmp_path: Path) -> None:
    package = tmp_path / "my_octavo_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "small.py").write_text("raise RuntimeError('imported')")
    plain = tmp_path / "plain_folder" / "deeper"  # without an __init__.py
    plain.mkdir(parents=True)
    (plain / "small.py").write_text("raise RuntimeError('imported')")
    path = list(sys.path)
    for module in ("my_octavo_models", "my_octavo_models.small", "plain_folder.deeper.small"):
        assert problems(f"--experimental.custom_import={module}", "--model.name=mine") == ""
    for module in ("my_octavo_models.large", "plain_folder.deeper.large", "plain_folder.other.small"):
        assert "no such module" in problems(f"--experimental.custom_import={module}")
    assert "my_octavo_models" not in sys.modules
    assert sys.path == path


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file; name another folder" in problems("--job.dump_folder=file")
    assert "lies below" in problems("--job.dump_folder=file/below/it")
    assert problems("--job.dump_folder=new/below/it") == ""
    Path("link").symlink_to("gone")
    assert "link is a link to nothing" in problems("--job.dump_folder=link")
    assert "link is a link to nothing" in problems("--job.dump_folder=link/below")
    assert not (tmp_path / "new").exists()
    told = problems("--job.dump_folder=.", "--checkpoint.enable", "--checkpoint.folder=file")
    assert told == "checkpoint.folder = file (--checkpoint.folder): file is a file; name a folder"


def test_load_step_that_does_not_exist(tmp_path: Path) -> None:
    argv = ["--job.dump_folder=out", "--checkpoint.enable", "--checkpoint.load_step=30"]
    assert "out/checkpoint has no complete checkpoint" in problems(*argv)
    for name in ("step-10", "step-200", "step-30.tmp", "step-x"):
        (tmp_path / "out/checkpoint" / name).mkdir(parents=True)
        (tmp_path / "out/checkpoint" / name / "state.json").write_text("{}")
    (tmp_path / "out/checkpoint/step-30").mkdir()
    assert "out/checkpoint has the steps 10, 200" in problems(*argv)
    (tmp_path / "out/checkpoint/step-30/state.json").write_text("{}")
    assert problems(*argv) == ""


@pytest.mark.parametrize(
    ("files", "in_hf", "told"),
    [
        (None, False, "no such folder"),
        ([], False, ""),
        (["step-1/state.json"], True, "but no *.safetensors is in this folder"),
        (["model.safetensors"], True, ""),
        (["model.safetensors"], False, "is a Hugging Face folder: add --checkpoint.initial_load_in_hf"),
        (["params.json"], False, "octavo import start --out FOLDER"),
    ],
)
def test_initial_weights_are_of_the_kind_that_is_said(
    tmp_path: Path, files: list[str] | None, in_hf: bool, told: str
) -> None:
    for file in files or []:
        (tmp_path / "start" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "start" / file).write_text("")
    if files is not None:
        (tmp_path / "start").mkdir(exist_ok=True)
    flags = ["--checkpoint.initial_load_in_hf"] if in_hf else []
    argv = ["--checkpoint.initial_load_path=start", *flags, "--job.dump_folder=out", "--checkpoint.enable"]
    message = problems(*argv)
    assert told in message
    assert bool(told) == bool(message)
    (tmp_path / "out/checkpoint/step-5").mkdir(parents=True)  # it resumes, and does not look at it again
    assert problems(*argv) == ""


@pytest.mark.parametrize("flag", ["training.enable_cpu_offload", "profiling.enable_memory_snapshot"])
def test_what_needs_a_gpu(flag: str) -> None:
    assert problems(f"--{flag}", gpus=0) == f"{flag} = true (--{flag}) needs a GPU, and there is none here"
    assert problems(f"--{flag}", gpus=1) == ""


def test_overlapped_products_need_a_gpu_and_compiled_layers() -> None:
    flag = "--parallelism.enable_async_tensor_parallel"
    argv = [flag, "--parallelism.tensor_parallel_degree=2"]
    compiled = [*argv, "--training.compile"]
    assert "no effect: the compiler does the overlapping" in problems(*argv, gpus=2, world_size=2)
    assert "no effect" in problems(*compiled, "--compile.components=loss", gpus=2, world_size=2)
    assert "needs a GPU" in problems(*compiled, gpus=0, world_size=2)
    assert problems(*compiled, gpus=2, world_size=2) == ""


def test_keys_that_travel_know_no_masks_and_no_float32_on_a_gpu() -> None:
    argv = [
        "--parallelism.context_parallel_degree=2",
        "--parallelism.context_parallel_rotate_method=alltoall",
    ]
    assert "document_mask = true: take allgather" in problems(*argv, "--training.document_mask", world_size=2)
    float32 = [*argv, "--training.mixed_precision_param=float32"]
    assert "no float32 on a GPU: take allgather" in problems(*float32, gpus=2, world_size=2)
    assert problems(*float32, gpus=0, world_size=2) == ""
    assert problems(*argv, gpus=2, world_size=2) == ""


def test_offloading_needs_fsdp() -> None:
    argv = ["--training.enable_cpu_offload", "--training.mixed_precision_param=float32"]
    assert "works with several processes" in problems(*argv, gpus=1)
    assert problems(*argv, gpus=2, world_size=2) == ""


def test_a_missing_package_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package tensorboard" in problems("--metrics.enable_tensorboard")
    assert "needs the package datasets" in problems("--training.dataset=c4")


def test_float8_gathers_need_several_processes_and_a_square_cast() -> None:
    float8 = "--model.converters=float8"
    gather, precompute = (
        f"--float8.{key}"
        for key in ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")
    )
    assert "one process, which shares nothing" in problems(float8, gather)
    assert "weights are not gathered in float8" in problems(float8, precompute, world_size=2)
    for recipe in ("tensorwise", "blockwise"):
        argv = [float8, gather, precompute, f"--float8.recipe_name={recipe}"]
        assert problems(*argv, world_size=2) == ""
    told = problems(float8, gather, "--float8.recipe_name=rowwise", world_size=2)
    assert "the recipe rowwise casts a weight differently" in told
    assert "tensorwise or blockwise" in told


_PROFILE = "--profiling.enable_profiling"

NO_EFFECT = [
    ("--float8.recipe_name=rowwise", '--model.converters="float8"', ["--model.converters=float8"], 1),
    ("--float8.filter_fqns=output", '--model.converters="float8"', ["--model.converters=float8"], 1),
    ("--float8.emulate", '--model.converters="float8"', ["--model.converters=float8"], 1),
    ("--float8.enable_fsdp_float8_all_gather", "--model.converters", ["--model.converters=float8"], 2),
    (
        "--float8.precompute_float8_dynamic_scale_for_fsdp",
        "--model.converters",
        ["--model.converters=float8", "--float8.enable_fsdp_float8_all_gather"],
        2,
    ),
    ("--checkpoint.folder=x", "--checkpoint.enable", ["--checkpoint.enable_checkpoint"], 1),
    ("--checkpoint.interval=5", "--checkpoint.enable", ["--checkpoint.enable"], 1),
    ("--checkpoint.load_step=-1", "--checkpoint.enable", ["--checkpoint.enable"], 1),
    ("--checkpoint.keep_latest_k=3", "--checkpoint.enable", ["--checkpoint.enable"], 1),
    ("--checkpoint.last_save_model_only", "--checkpoint.enable", ["--checkpoint.enable"], 1),
    ("--checkpoint.last_save_in_hf", "--checkpoint.enable", ["--checkpoint.enable"], 1),
    (
        "--checkpoint.export_dtype=bfloat16",
        "--checkpoint.last_save_in_hf",
        ["--checkpoint.enable", "--checkpoint.last_save_in_hf"],
        1,
    ),
    ("--checkpoint.async_mode=async", "--checkpoint.enable", ["--checkpoint.enable"], 1),
    ("--profiling.save_traces_folder=x", "enable_profiling", ["--profiling.enable_profiling"], 1),
    ("--profiling.profile_freq=5", "enable_profiling", ["--profiling.enable_profiling"], 1),
    ("--profiling.profile_freq=5", "enable_memory_snapshot", ["--profiling.enable_memory_snapshot"], 1),
    (
        "--profiling.save_memory_snapshot_folder=x",
        "enable_memory_snapshot",
        ["--profiling.enable_memory_snapshot"],
        1,
    ),
    ("--metrics.save_tb_folder=x", "enable_tensorboard", ["--metrics.enable_tensorboard"], 1),
    ("--metrics.save_for_all_ranks", "enable_tensorboard", ["--metrics.enable_tensorboard"], 1),
    ("--compile.components=loss", "--training.compile", ["--training.compile"], 1),
    ("--parallelism.fsdp_reshard_after_forward=never", "NGPU=2", [], 2),
    ("--training.mixed_precision_reduce=float32", "NGPU=2", [], 2),
    (
        "--parallelism.enable_async_tensor_parallel",
        "--parallelism.tensor_parallel_degree",
        ["--parallelism.tensor_parallel_degree=2", "--training.compile"],
        2,
    ),
    (
        "--parallelism.context_parallel_rotate_method=alltoall",
        "--parallelism.context_parallel_degree",
        ["--parallelism.context_parallel_degree=2"],
        2,
    ),
    ("--comm.init_timeout_seconds=9", "NGPU=2", [], 2),
    ("--comm.train_timeout_seconds=9", "NGPU=2", [], 2),
]


@pytest.mark.parametrize(("flag", "remedy", "cure", "world_size"), NO_EFFECT)
def test_a_flag_without_effect(flag: str, remedy: str, cure: list[str], world_size: int) -> None:
    told = problems(flag)
    assert told.startswith(f"{flag.partition('=')[0]} would have no effect: ")
    assert remedy in told
    assert problems(flag, *cure, world_size=world_size) == ""


@pytest.mark.parametrize(
    ("flag", "remedy", "context"),
    [
        ("--activation_checkpoint.selective_ac_option=2", "mode", ["--activation_checkpoint.mode=full"]),
        ("--lr_scheduler.decay_type=sqrt", "decay_ratio is 0", ["--lr_scheduler.decay_ratio=0"]),
        ("--lr_scheduler.min_lr_factor=0.1", "decay_ratio is 0", ["--lr_scheduler.decay_ratio=0"]),
        ("--profiling.enable_profiling", "lower --profiling.profile_freq", ["--training.steps=9"]),
        ("--profiling.profile_freq=300", "exceeds training.steps", [_PROFILE, "--training.steps=299"]),
        ("--profiling.save_traces_folder=x", "no step is recorded", [_PROFILE, "--training.steps=9"]),
        ("--lr_scheduler.decay_ratio=0.5", "warm-up takes all", ["--lr_scheduler.warmup_steps=300"]),
    ],
)
def test_a_flag_without_effect_because_of_another(flag: str, remedy: str, context: list[str]) -> None:
    prepared = [_PROFILE] if flag.startswith("--profiling") else []
    assert problems(flag, *prepared) == ""
    assert remedy in problems(flag, *context)


@pytest.mark.parametrize("flag", ["--float8.cast_weights_once", "--float8.no-cast_weights_once"])
def test_casting_once_matters_only_where_weights_are_cast_again(flag: str) -> None:
    once = [flag, "--model.converters=float8", "--activation_checkpoint.mode=none"]
    told = problems(*once)
    assert told.startswith(f"{flag} would have no effect: nothing casts a weight twice in a step")
    assert "would have no effect" in problems(*once, "--training.global_batch_size=8")
    assert "would have no effect" in problems(*once, "--training.global_batch_size=16", world_size=2)
    assert problems(*once, "--training.global_batch_size=16") == ""
    assert problems(*once, "--activation_checkpoint.mode=full") == ""
    assert problems(*once, "--float8.enable_fsdp_float8_all_gather", world_size=2) == ""


def test_a_format_matters_only_where_something_is_loaded() -> None:
    told = problems("--checkpoint.initial_load_in_hf")
    assert told.startswith("--checkpoint.initial_load_in_hf would have no effect: no initial weights")
    assert "add --checkpoint.initial_load_path" in told


def test_compiling_on_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_INDUCTOR_INSTALL_GXX", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = problems("--training.compile", gpus=0)
    assert told.startswith("compile.enable = true (--training.compile) needs a C++ compiler")
    assert all(part in told for part in ("no-such-compiler", "apt install g++", "CXX", "--compile.no-enable"))
    assert problems("--training.compile", gpus=1) == ""
    assert problems(gpus=0) == ""
    monkeypatch.setenv("CXX", "true")
    assert problems("--training.compile", gpus=0) == ""


def test_a_setting_without_effect_is_inert_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        "[float8]\nrecipe_name = 'rowwise'\nfilter_fqns = ['output']\n"
        "[checkpoint]\ninterval = 5\n[compile]\ncomponents = ['loss']\n[comm]\ntrain_timeout_seconds = 9\n"
    )
    assert problems("--config_file=x.toml") == ""
    assert "--float8.emulate would have no effect" in problems("--config_file=x.toml", "--float8.emulate")


def test_needs_name_keys_that_exist_and_never_the_switch_itself() -> None:
    keys = [f"{section}.{key}" for section, section_keys in SECTIONS.items() for key in section_keys]
    job = JobConfig()
    job.given = dict.fromkeys(keys, "cli")
    job.where = {key: key for key in keys}
    job.lr_scheduler = dataclasses.replace(job.lr_scheduler, decay_ratio=0.0)
    job.activation_checkpoint = dataclasses.replace(job.activation_checkpoint, mode="none")
    useless = {problem.partition(" ")[0] for problem in without_effect(job, 1)}
    switches = {"checkpoint.enable", "compile.enable", "profiling.enable_profiling", "model.converters"}
    assert not useless & switches
    for need in NEEDS:
        for pattern in need.keys:
            assert any(key == pattern or key.startswith(pattern.rstrip("*")) for key in keys), pattern


def test_a_warm_up_longer_than_a_short_trial_is_noted_not_refused() -> None:
    job = load(["--training.steps=5"])
    check(job, world_size=1)
    assert notes(job) == [
        "lr_scheduler.warmup_steps = 200 exceeds training.steps = 5: every step is warm-up",
    ]
    assert notes(load(["--training.steps=200"])) == []
