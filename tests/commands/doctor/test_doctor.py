"""octavo doctor: the verdict, the exit code and the next command, for working and broken setups."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from octavo.commands.doctor import float8_checks, job_checks, machine_checks, main, memory_checks
from octavo.commands.doctor.findings import Level, fail
from octavo.float8.checks.selfcheck import Check
from tests.helpers import warm
from tests.helpers.waiting import LIMIT, wait_for, wait_for_text
from tests.models.own import own_model

BEGIN = memory_checks.start_estimate


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """Nothing of the caller's, and no estimate, which takes ten seconds: `estimated` brings it back."""
    monkeypatch.setattr(memory_checks, "start_estimate", lambda options, gpus: None)
    for name in ("CONFIG_FILE", "NGPU", "NNODES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine_checks, "nvidia_smi", list)
    monkeypatch.setattr(main.launcher, "count_gpus", lambda environ: 0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def estimated(monkeypatch):
    monkeypatch.setattr(memory_checks, "start_estimate", BEGIN)
    monkeypatch.setattr(sys, "executable", warm.python())


def doctor(capsys, *argv):
    """The exit code and the JSON output."""
    code = main.main([*argv, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == code
    return code, told


def failures(told):
    return [f for part in ("machine", "float8", "job") for f in told[part] if f["level"] == "FAIL"]


def test_a_machine_without_a_gpu_is_ready_and_emulates(capsys):
    code, told = doctor(capsys)

    assert code == 0
    assert told["verdict"].startswith("Ready: the machine can train")
    assert told["next"].endswith("run_train.sh")
    assert failures(told) == []
    assert any("emulated" in f["told"] and "blockwise" in f["told"] for f in told["float8"])
    assert any("products tried" in f["told"] for f in told["float8"])


def test_the_text_ends_in_the_verdict_and_the_next_command(capsys):
    assert main.main([]) == 0

    *_, verdict, following = capsys.readouterr().out.splitlines()
    assert verdict.startswith("Ready:")
    assert following.startswith("Next: ")


def test_a_sound_config_is_ready(capsys, monkeypatch, estimated):
    monkeypatch.setenv("NGPU", "2")

    code, told = doctor(capsys, "--config-file", "debug_model.toml", "--training.steps=5")

    assert code == 0
    assert told["verdict"].startswith("Ready: this job can train")
    assert "--training.steps=5" in told["next"]
    assert told["next"].startswith("NGPU=2 ")
    texts = [f["told"] for f in told["job"]]
    assert "debug_model.toml: valid, for 2 processes" in texts
    assert any("6,163,712 parameters" in text for text in texts)


def test_a_config_named_by_the_variable_is_checked(capsys, monkeypatch):
    monkeypatch.setenv("CONFIG_FILE", "debug_model.toml")

    _, told = doctor(capsys)

    assert told["next"].startswith("CONFIG_FILE=debug_model.toml ")
    assert told["job"]

    monkeypatch.setenv("CONFIG_FILE", "llama3_8b.toml")
    monkeypatch.setenv("NGPU", "2")

    assert "; then NGPU=2 CONFIG_FILE=llama3_8b.toml " in doctor(capsys)[1]["next"]


def test_a_config_flag_overrides_the_variable(capsys, monkeypatch):
    monkeypatch.setenv("CONFIG_FILE", "llama3_8b.toml")

    _, told = doctor(capsys, "--config-file", "debug_model.toml")

    assert "debug_model.toml" in told["next"]
    assert "CONFIG_FILE=" not in told["next"]


def test_a_module_of_the_users_own_is_not_imported(capsys, tmp_path, monkeypatch):
    own_model(tmp_path, monkeypatch)
    (tmp_path / "small_llamas.py").write_text("raise RuntimeError('it ran')")

    code, told = doctor(
        capsys, "--config-file", "debug_model.toml", "--experimental.custom_import=small_llamas",
        "--model.name=small_llama",
    )  # fmt: skip

    assert code == 0
    (found,) = [f for f in told["job"] if f["what"] == "model"]
    assert found["level"] == "note"
    assert "experimental.custom_import = small_llamas is not imported here" in found["told"]


def test_each_thing_wrong_in_a_config_is_a_finding(capsys):
    code, told = doctor(
        capsys, "--config-file", "debug_model.toml", "--training.stepz=5", "--optimizer.name=SGD"
    )

    assert code == 2
    assert told["verdict"] == "Not ready: 2 problems with this job."
    assert any("--training.steps" in f["told"] for f in failures(told))
    assert told["next"].endswith("doctor --job.config_file=debug_model.toml")


def test_all_problems_are_reported_in_one_run(capsys):
    code, told = doctor(
        capsys,
        "--config-file=debug_model.toml",
        "--training.stepz=5",
        "--model.hf_assets_path=/nowhere",
        "--job.dump_folder=/proc/x",
        "--training.dataset=",
    )

    assert code == 2
    texts = [f["told"] for f in failures(told)]
    assert len(texts) == 4
    assert texts[0].startswith("--training.stepz: unknown flag")
    assert "must not be empty" in texts[1]
    assert texts[2].startswith("model.hf_assets_path = /nowhere")
    assert texts[3].startswith("job.dump_folder = /proc/x")


def test_a_value_out_of_range_is_reported_with_a_missing_tokenizer(capsys):
    _, told = doctor(
        capsys, "--config-file=debug_model.toml", "--training.steps=-5", "--model.hf_assets_path=/nowhere"
    )

    first, second = failures(told)
    assert first["told"].startswith("training.steps = -5")
    assert second["told"].startswith("model.hf_assets_path ")
    assert second["remedy"] == "name a folder with tokenizer.json, or a shipped one: octavo_bpe_2048"


def test_a_key_that_a_hint_names_is_reported_too(capsys):
    _, told = doctor(capsys, "--config-file=debug_model.toml", "--training.stepz=5", "--training.steps=-5")

    first, second = failures(told)
    assert first["told"].endswith("did you mean '--training.steps'?")
    assert second["told"].startswith("training.steps = -5")


@pytest.mark.parametrize("other", ["--training.stepz=5", "--training.steps=-5"])
def test_a_broken_tokenizer_and_a_wrong_flavor_are_reported_together(capsys, tmp_path, other):
    (tmp_path / "tokenizer.json").write_text("{}")

    _, told = doctor(
        capsys,
        "--config-file=debug_model.toml",
        other,
        f"--model.hf_assets_path={tmp_path}",
        "--model.flavor=9B",
    )

    assert [f["what"] for f in failures(told)] == ["config", "config", "tokenizer"]
    assert failures(told)[1]["told"].startswith("model.flavor = 9B")
    assert str(tmp_path / "tokenizer.json") in failures(told)[2]["told"]


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [
        (["debug_model.toml"], "--config-file=debug_model.toml"),
        (["--training.steps", "5", "debug_model.toml"], "--config-file=debug_model.toml --training.steps=5"),
        (["--training.steps=5", "nowhere.toml"], "--training.steps=5"),
        (["--config-file=nowhere.toml", "--training.steps=5"], "--training.steps=5"),
        *(
            (["--config-file=debug_model.toml", *flags], "--job.config_file=debug_model.toml")
            for flags in (
                ["foo", "bar"],
                ["--training.steps=x"],
                ["--checkpoint.enable=maybe"],
                ["--training.steps=-5"],
                ["--job.dump_folder=/proc/x"],
                ["--model.tokenizer_path=/x"],
            )
        ),
    ],
)
def test_the_next_command_works(capsys, wrong, kept):
    code, told = doctor(capsys, *wrong)

    assert code == 2
    again = told["next"].partition(" doctor ")[2]
    assert again == kept
    assert doctor(capsys, *again.split())[0] == 0


def test_a_package_that_the_job_needs_is_installed_and_the_job_stays(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))

    _, told = doctor(capsys, "--config-file=debug_model.toml", "--metrics.enable_wandb")

    (problem,) = failures(told)
    assert problem["remedy"] == "pip install wandb"
    assert told["next"].startswith("pip install wandb; then ")
    assert told["next"].endswith("doctor --job.config_file=debug_model.toml --metrics.enable_wandb")


@pytest.mark.parametrize("folder", ["/proc/x", "file/below"])
def test_a_folder_that_cannot_be_written(capsys, tmp_path, folder):
    (tmp_path / "file").write_text("")

    code, told = doctor(capsys, "--config-file=debug_model.toml", f"--job.dump_folder={folder}")

    assert code == 2
    (problem,) = failures(told)
    assert problem["told"].startswith(f"job.dump_folder = {folder}")
    assert told["next"].startswith("name another folder; then ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("batch", "level", "words", "verdict"),
    [(1, "ok", "and the machine has", "Ready:"), (10**6, "warn", "not fit", "Doubtful:")],
)
def test_the_memory_that_a_job_would_take(capsys, monkeypatch, estimated, batch, level, words, verdict):
    monkeypatch.setattr(job_checks.memory_checks, "_SECONDS", LIMIT)

    code, told = doctor(capsys, "--config-file=debug_model.toml", f"--training.local_batch_size={batch}")

    assert code == 0
    (found,) = [f for f in told["job"] if f["what"] == "memory"]
    assert found["level"] == level
    assert words in found["told"]
    assert told["verdict"].startswith(verdict)
    assert ("run_train.sh" in told["next"]) == (level == "ok")


def test_the_forks_of_an_estimate_end_with_it(monkeypatch, tmp_path):
    """The processes that trace are forks of the one that is waited for."""
    monkeypatch.setattr(job_checks.memory_checks.sys, "executable", endless(tmp_path))
    monkeypatch.setattr(job_checks.memory_checks, "_SECONDS", 0.0)

    estimate = job_checks.memory_checks.MemoryEstimate([], 1, 0)
    forked = int(wait_for_text(tmp_path / "forked", "\n"))
    assert job_checks.memory_checks.check_memory(estimate, processes=1, gpus=0).level is Level.NOTE

    try:
        wait_for("the end of the estimate's fork", lambda: _has_ended(forked))
    except AssertionError:
        os.kill(forked, signal.SIGKILL)
        raise


def endless(folder):
    """A program in place of Python's, for an estimate that forks and never comes to an end."""
    program = folder / "estimate"
    program.write_text("#!/bin/sh\nsleep 1000 &\necho $! > forked\nwait\n")
    program.chmod(0o755)
    return str(program)


def _has_ended(process):
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return True
    return state == "Z"


def test_an_estimate_that_takes_too_long_is_killed(capsys, monkeypatch, estimated, tmp_path):
    monkeypatch.setattr(job_checks.memory_checks.sys, "executable", endless(tmp_path))
    monkeypatch.setattr(job_checks.memory_checks, "_SECONDS", 0.0)

    code, told = doctor(capsys, "--config-file=debug_model.toml")

    assert code == 0
    (found,) = [f for f in told["job"] if f["what"] == "memory"]
    assert "is not known" in found["told"]
    assert "estimate --job.config_file=debug_model.toml --ngpu=1 --device=cpu" in found["remedy"]


def test_a_missing_config_file(capsys):
    code, told = doctor(capsys, "--config-file", "nowhere.toml", "--model.flavor=mine")

    assert code == 2
    (problem,) = failures(told)  # a flavor is not checked without its model
    assert "no such file" in problem["told"]


def test_a_missing_tokenizer_gets_the_command_that_fetches_it(capsys):
    code, told = doctor(capsys, "--config-file", "llama3_8b.toml")

    assert code == 2
    (problem,) = failures(told)
    assert "no such tokenizer" in problem["told"]
    assert "download --repo_id meta-llama/Llama-3.1-8B" in problem["remedy"]
    assert told["next"].startswith(problem["remedy"])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("mine", "octavo_bpe_2048"),
        ("Llama-3.1-8B", "download --repo_id meta-llama/Llama-3.1-8B --assets tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(capsys, tmp_path, name, remedy):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "tokenizer.json").write_text("not JSON")

    code, told = doctor(capsys, "--config-file", "debug_model.toml", f"--model.hf_assets_path={folder}")

    assert code == 2
    (problem,) = failures(told)
    assert problem["what"] == "tokenizer"
    assert str(folder) in problem["told"]
    assert remedy in problem["remedy"]
    assert told["next"].startswith(problem["remedy"])


@pytest.mark.parametrize(
    ("free", "flags", "expected"),
    [(10**8, [], 0), (10**8, ["--checkpoint.enable"], 2), (10**6, [], 2)],
)
def test_free_space(capsys, monkeypatch, free, flags, expected):
    """Two checkpoints of 74 MB must fit; metrics always need some space."""
    monkeypatch.setattr(job_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    code, told = doctor(capsys, "--config-file", "debug_model.toml", *flags)

    assert code == expected
    if code:
        (problem,) = failures(told)
        assert problem["what"] == "disk"
        assert problem["told"].startswith(f"{free / 1e9:.1f} GB free")
        assert told["next"].startswith(problem["remedy"])


def test_without_torch_the_remedy_is_the_install_command():
    program = (
        "import sys; sys.modules['torch'] = None  # what makes `import torch` raise\n"
        "from octavo.commands.doctor.main import main\n"
        "sys.exit(main(['--config-file', 'debug_model.toml', '--json']))"
    )

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)

    told = json.loads(ended.stdout)
    assert ended.returncode == told["exit_code"] == 1
    assert told["machine"][1] == {
        "level": "FAIL",
        "what": "torch",
        "told": "is not installed",
        "remedy": "pip install 'torch>=2.11'",
    }
    assert told["next"].startswith("pip install 'torch>=2.11'")


def test_a_machine_that_is_not_ready_beside_a_value_that_is_none(capsys, monkeypatch):
    """Without torch the job is not checked."""
    missing = [fail("torch", "is not installed", "pip install torch")]
    monkeypatch.setattr(machine_checks, "check_machine", lambda: missing)
    monkeypatch.setattr(main, "_check_job", lambda *given: [])

    code, told = doctor(capsys, "--config-file=debug_model.toml", "--checkpoint.enable=maybe")

    assert code == 1
    assert told["next"].endswith("doctor --job.config_file=debug_model.toml")


def test_a_gpu_that_torch_does_not_see(capsys, monkeypatch):
    monkeypatch.setattr(machine_checks, "nvidia_smi", lambda: ["NVIDIA H100 80GB HBM3, 570.86, 81559, 9.0"])

    code, told = doctor(capsys)

    assert code == 1
    texts = [f["told"] for f in told["machine"]]
    assert "NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0, driver 570.86" in texts
    assert "torch sees none" in failures(told)[0]["told"]


def test_a_product_that_is_wrong_here(capsys, monkeypatch):
    bad = Check("rowwise", "output", "torch._scaled_mm", 0.5, 1e-5, True)
    monkeypatch.setattr(float8_checks.quantization, "check_products", lambda device: iter([bad]))

    code, told = doctor(capsys)

    assert code == 1
    assert "rowwise output through torch._scaled_mm: the result is 5.0e-01 off" in failures(told)[0]["told"]


@pytest.mark.parametrize(
    ("text", "wanted"), [("2.13.0+cpu", (2, 13)), ("3.6.0", (3, 6)), ("2.11rc1", (2, 11))]
)
def test_numbers_of_a_version(text, wanted):
    assert machine_checks.numbers(text) == wanted


@pytest.mark.parametrize("name", machine_checks._REQUIRED)
def test_a_package_that_training_needs(capsys, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))

    (problem,) = failures(doctor(capsys)[1])
    assert name in problem["told"]
