"""What `check` refuses of names, paths and combinations; its message has the value, the limit, the remedy."""

import sys
import tempfile
from pathlib import Path

import pytest

from octavo.config import JobConfig, load
from octavo.core.programs import octavo_command
from octavo.preflight import check, notes
from tests.config.judged import problems


def test_the_defaults_are_in_order() -> None:
    check(JobConfig(), world_size=1, gpus=0)
    check(JobConfig(), world_size=8, gpus=8)


REPLICATE, SHARD, TENSOR, CONTEXT = (
    f"--parallelism.{key}_degree"
    for key in ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "context_parallel")
)
GLOBAL, LOCAL = "--training.global_batch_size", "--training.local_batch_size"


@pytest.mark.parametrize(
    ("argv", "world_size", "parts"),
    [
        (f"{GLOBAL}=16", 3, ["8 x 3 = 24", "24 would be"]),
        (f"{GLOBAL}=40", 3, ["8 x 3 = 24", "24 or 48 would be"]),
        (f"{GLOBAL}=4", 1, ["8 x 1 = 8"]),
        (f"{LOCAL}=3 {GLOBAL}=8", 2, ["3 x 2 = 6", "6 or 12"]),
        (f"{SHARD}=4", 2, ["data_parallel_shard_degree = 4", "2 processes"]),
        (f"{REPLICATE}=3", 4, ["= 3", "does not divide 4 processes"]),
        (f"{REPLICATE}=2 {SHARD}=2", 8, ["2 x 2 = 4", "8 processes"]),
        (
            f"{TENSOR}=2 {CONTEXT}=3",
            4,
            ["context_parallel_degree x tensor_parallel_degree = 3 x 2 = 6 does not divide 4 processes"],
        ),
        (f"{TENSOR}=2", 1, ["= 2 does not divide 1 process"]),
        (f"{TENSOR}=2 {GLOBAL}=12", 4, ["local_batch_size x data parallel groups = 8 x 2 = 16"]),
        (
            f"{TENSOR}=2 {CONTEXT}=2 --training.seq_len=100",
            4,
            ["tensor_parallel_degree = 2 times 2 x context_parallel_degree = 4", "96 or 104 would be"],
        ),
    ],
)
def test_arithmetic_that_does_not_come_out(argv: str, world_size: int, parts: list[str]) -> None:
    told = problems(*argv.split(), world_size=world_size)
    assert all(part in told for part in parts), told


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        (f"{GLOBAL}=48", 3),
        (f"{REPLICATE}=2", 8),
        (f"{REPLICATE}=2 {SHARD}=4", 8),
        (f"{SHARD}=8", 8),
        (f"{TENSOR}=2 {GLOBAL}=16", 4),
        (f"{TENSOR}=2 {CONTEXT}=2", 8),
    ],
)
def test_arithmetic_that_comes_out(argv: str, world_size: int) -> None:
    assert problems(*argv.split(), world_size=world_size) == ""


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
    assert "link is a dead link" in problems("--job.dump_folder=link")
    assert "link is a dead link" in problems("--job.dump_folder=link/below")
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
        (["model.safetensors"], False, "is a Hugging Face folder; add --checkpoint.initial_load_in_hf"),
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
    assert problems(f"--{flag}", gpus=0) == f"{flag} = true (--{flag}) needs a GPU, and this machine has none"
    assert problems(f"--{flag}", gpus=1) == ""


def test_overlapped_products_need_a_gpu_and_compiled_layers() -> None:
    flag = "--parallelism.enable_async_tensor_parallel"
    argv = [flag, "--parallelism.tensor_parallel_degree=2"]
    compiled = [*argv, "--training.compile"]
    assert "no effect: the compiler overlaps them" in problems(*argv, gpus=2, world_size=2)
    assert "no effect" in problems(*compiled, "--compile.components=loss", gpus=2, world_size=2)
    assert "needs a GPU" in problems(*compiled, gpus=0, world_size=2)
    assert problems(*compiled, gpus=2, world_size=2) == ""


def test_ring_attention_has_no_masks_and_no_float32_on_a_gpu() -> None:
    argv = [
        "--parallelism.context_parallel_degree=2",
        "--parallelism.context_parallel_rotate_method=alltoall",
    ]
    masked = problems(*argv, "--training.document_mask", world_size=2)
    assert "document_mask = true (--training.document_mask); set it to allgather" in masked
    float32 = [*argv, "--training.mixed_precision_param=float32"]
    assert "no float32 on a GPU; set it to allgather" in problems(*float32, gpus=2, world_size=2)
    assert problems(*float32, gpus=0, world_size=2) == ""
    assert problems(*argv, gpus=2, world_size=2) == ""


def test_offloading_needs_fsdp() -> None:
    argv = ["--training.enable_cpu_offload", "--training.mixed_precision_param=float32"]
    assert "works with several processes" in problems(*argv, gpus=1)
    assert problems(*argv, gpus=2, world_size=2) == ""


def test_the_dtype_of_a_cpu_is_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, told in {
        "": "",
        "bfloat16": "",
        "bf16": "OCTAVO_CPU_DTYPE=bf16: expected float32 or bfloat16",
    }.items():
        monkeypatch.setenv("OCTAVO_CPU_DTYPE", asked)
        assert problems() == told


PIPE = ["--parallelism.pipeline_parallel_degree=4", "--training.local_batch_size=8"]


@pytest.mark.parametrize(
    ("argv", "world_size", "told"),
    [
        (["--parallelism.tensor_parallel_degree=3"], 3, "the model has 16 heads (16 / 3 = 5.33)"),
        (
            ["--parallelism.tensor_parallel_degree=16", "--model.flavor=8B"],
            16,
            "8 key/value heads (8 / 16 = 0.50), which do not divide evenly; degrees that divide them: 1, 2",
        ),
        (
            [
                "--parallelism.pipeline_parallel_degree=8",
                "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
            ],
            8,
            "and this model has 6; lower it",
        ),
        ([*PIPE, "--model.flavor=1B"], 4, "output projection is its embedding (tied)"),
    ],
)
def test_what_the_models_sizes_forbid_is_the_one_thing_told(
    argv: list[str], world_size: int, told: str
) -> None:
    found = problems(*argv, "--model.hf_assets_path=octavo_bpe_2048", world_size=world_size)
    assert told in found
    assert "\n" not in found


def test_a_model_of_ones_own_is_judged_once_it_is_known(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    argv = ["--experimental.custom_import=own", "--model.name=own", "--training.seq_len=66"]
    assert problems(*argv, "--parallelism.tensor_parallel_degree=3", world_size=3) == ""


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
    assert "there is only one process" in problems(float8, gather)
    assert "weights are not gathered in float8" in problems(float8, precompute, world_size=2)
    for recipe in ("tensorwise", "blockwise"):
        argv = [float8, gather, precompute, f"--float8.recipe_name={recipe}"]
        assert problems(*argv, world_size=2) == ""
    told = problems(float8, gather, "--float8.recipe_name=rowwise", world_size=2)
    assert ": float8.recipe_name = rowwise (--float8.recipe_name) casts a weight differently" in told
    assert "tensorwise or blockwise" in told


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


@pytest.mark.parametrize("variable", ["TMPDIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_compiling_on_a_cpu_needs_paths_without_spaces(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (spaced := tmp_path / "a b").mkdir()
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setenv(variable, str(spaced))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert f"where {variable} has a space in it ({spaced})" in problems("--training.compile", gpus=0)
    assert problems("--training.compile", gpus=1) == problems(gpus=0) == ""


def test_a_schedule_is_no_shorter_than_the_run() -> None:
    span = "--lr_scheduler.total_steps"
    assert problems(f"{span}=300", "--training.steps=250") == ""
    assert "is less than training.steps = 250" in problems(f"{span}=249", "--training.steps=250")
    warmup = "--lr_scheduler.warmup_steps=400"
    assert "exceeds lr_scheduler.total_steps = 300" in problems(f"{span}=300", "--training.steps=250", warmup)
    assert problems(f"{span}=500", "--training.steps=250", warmup) == ""


def test_a_warm_up_longer_than_a_short_trial_is_noted_not_refused() -> None:
    job = load(["--training.steps=5"])
    check(job, world_size=1)
    assert notes(job) == [
        "lr_scheduler.warmup_steps = 200 exceeds training.steps = 5: every step is warm-up",
    ]
    assert notes(load(["--training.steps=200"])) == []


def test_warm_up_and_decay_that_overlap_are_refused_by_flag_and_noted_from_a_file(tmp_path: Path) -> None:
    overlap = (
        "lr_scheduler.warmup_steps = 60 and lr_scheduler.decay_ratio = 0.5 (50 steps) overlap in "
        "training.steps = 100"
    )
    flags = ["--training.steps=100", "--lr_scheduler.warmup_steps=60", "--lr_scheduler.decay_ratio=0.5"]
    assert problems(*flags) == f"{overlap}; lower one of the two"
    assert problems(*flags[:2], "--lr_scheduler.decay_ratio=0.4") == ""
    file = tmp_path / "job.toml"
    file.write_text("[training]\nsteps = 100\n[lr_scheduler]\nwarmup_steps = 60\ndecay_ratio = 0.5\n")
    job = load([f"--job.config_file={file}"])
    check(job, world_size=1)
    assert notes(job) == [f"{overlap}: the decay begins after warm-up instead"]


# What saves memory, and with what it does not go together.
REFUSED = [
    (
        ["--model.fuse=on", "--parallelism.tensor_parallel_degree=2"],
        2,
        "tensor parallel weights are not fused",
    ),
    (
        ["--training.loss_chunk_tokens=64", "--parallelism.tensor_parallel_degree=2"],
        2,
        "part of the vocabulary",
    ),
    (["--training.loss_chunk_tokens=64", "--parallelism.pipeline_parallel_degree=2"], 2, "whole logits"),
    (["--training.loss_chunk_tokens=1000000"], 1, "no effect: a device has at most that many tokens"),
    (["--optimizer.name=AdamW8bit"], 2, "needs whole parameters"),
    (["--optimizer.name=Adam", "--training.dtype=bfloat16"], 1, "would lose small updates"),
    (["--optimizer.name=Adam", "--optimizer.state_dtype=bfloat16"], 1, "only AdamW has a choice"),
    (["--optimizer.state_dtype=bfloat16", "--optimizer.implementation=foreach"], 1, "PyTorch's optimizers"),
    (
        ["--model.converters=float8", "--float8.recipe_name=rowwise", "--float8.share_scales"],
        1,
        "only tensorwise",
    ),
    (["--model.converters=float8", "--model.fuse=off", "--float8.share_scales"], 1, "nothing is fused"),
]


@pytest.mark.parametrize(("flags", "world_size", "told"), REFUSED)
def test_what_saves_memory_and_cannot_be_combined(flags: list[str], world_size: int, told: str) -> None:
    assert told in problems(*flags, world_size=world_size)
