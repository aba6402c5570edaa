"""octavo doctor: the verdict, the exit code and the next command, on sound and on broken set-ups."""

import json
import subprocess
import sys

import pytest

from octavo.doctor import float8, job, machine, main
from octavo.doctor.findings import Level
from octavo.float8.selfcheck import Check


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    for name in ("CONFIG_FILE", "NGPU", "NNODES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "nvidia_smi", list)
    monkeypatch.setattr(main.launch, "count_gpus", lambda environ: 0)
    monkeypatch.chdir(tmp_path)


def doctor(capsys, *argv):
    """The exit code, and what is told as JSON."""
    code = main.main([*argv, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == code
    return code, told


def failures(told):
    return [f for part in ("machine", "float8", "job") for f in told[part] if f["level"] == "FAIL"]


def test_a_machine_without_a_gpu_is_ready_and_told_that_it_emulates(capsys):
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


def test_a_sound_config_is_ready(capsys, monkeypatch):
    monkeypatch.setenv("NGPU", "2")

    code, told = doctor(capsys, "--config-file", "debug_model.toml", "--training.steps=5")

    assert code == 0
    assert told["verdict"].startswith("Ready: this job can train")
    assert "--training.steps=5" in told["next"]
    assert told["next"].startswith("NGPU=2 ")
    texts = [f["told"] for f in told["job"]]
    assert "debug_model.toml: nothing wrong, for 2 processes" in texts
    assert any("6,163,712 parameters" in text for text in texts)


def test_a_config_named_by_the_variable_is_looked_at(capsys, monkeypatch):
    monkeypatch.setenv("CONFIG_FILE", "debug_model.toml")

    _, told = doctor(capsys)

    assert told["next"].startswith("CONFIG_FILE=debug_model.toml ")
    assert told["job"]


def test_each_thing_wrong_in_a_config_is_a_finding(capsys):
    code, told = doctor(
        capsys, "--config-file", "debug_model.toml", "--training.stepz=5", "--optimizer.name=SGD"
    )

    assert code == 2
    assert told["verdict"] == "Not ready: 2 things to mend in this job."
    assert any("--training.steps" in f["told"] for f in failures(told))
    assert "doctor --job.config_file=debug_model.toml --training.stepz=5" in told["next"]


def test_a_missing_config_file(capsys):
    code, told = doctor(capsys, "--config-file", "nowhere.toml")

    assert code == 2
    assert "no such file" in failures(told)[0]["told"]


def test_a_missing_tokenizer_gets_the_command_that_fetches_it(capsys):
    code, told = doctor(capsys, "--config-file", "llama3_8b.toml")

    assert code == 2
    (problem,) = failures(told)
    assert "no such tokenizer" in problem["told"]
    assert "download --repo_id meta-llama/Llama-3.1-8B" in problem["remedy"]
    assert told["next"].startswith(problem["remedy"])


def test_a_tokenizer_that_cannot_be_read(capsys, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")

    code, told = doctor(capsys, "--config-file", "debug_model.toml", f"--model.hf_assets_path={tmp_path}")

    assert code == 2
    assert str(tmp_path) in failures(told)[0]["told"]


def test_a_disk_too_small_for_two_checkpoints(capsys, monkeypatch):
    usage = type("usage", (), {"free": 100_000_000})
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage)
    sound, _ = doctor(capsys, "--config-file", "debug_model.toml")

    code, told = doctor(capsys, "--config-file", "debug_model.toml", "--checkpoint.enable")

    assert sound == 0
    assert code == 2
    assert "0.1 GB free" in failures(told)[0]["told"]


def test_without_torch_it_says_so_and_how_to_get_it():
    program = (
        "import sys; sys.modules['torch'] = None  # what makes `import torch` raise\n"
        "from octavo.doctor.main import main; sys.exit(main(['--config-file', 'debug_model.toml', '--json']))"
    )

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    told = json.loads(ended.stdout)
    assert ended.returncode == told["exit_code"] == 1
    assert told["machine"][1] == {
        "level": "FAIL",
        "what": "torch",
        "told": "is not installed",
        "remedy": "pip install 'torch>=2.11'",
    }
    assert told["next"].startswith("pip install 'torch>=2.11'")


def test_a_gpu_that_torch_does_not_see(capsys, monkeypatch):
    monkeypatch.setattr(machine, "nvidia_smi", lambda: ["NVIDIA H100 80GB HBM3, 570.86, 81559, 9.0"])

    code, told = doctor(capsys)

    assert code == 1
    texts = [f["told"] for f in told["machine"]]
    assert "NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0, driver 570.86" in texts
    assert "torch sees none" in failures(told)[0]["told"]


def test_a_product_that_is_wrong_here(capsys, monkeypatch):
    bad = Check("rowwise", "output", "torch._scaled_mm", 0.5, 1e-5, True)
    monkeypatch.setattr(float8.quantization, "check_products", lambda device: iter([bad]))

    code, told = doctor(capsys)

    assert code == 1
    assert "rowwise output through torch._scaled_mm: the result is 5.0e-01 off" in failures(told)[0]["told"]


@pytest.mark.parametrize(
    ("text", "wanted"), [("2.13.0+cpu", (2, 13)), ("3.6.0", (3, 6)), ("2.11rc1", (2, 11))]
)
def test_numbers_of_a_version(text, wanted):
    assert machine.numbers(text) == wanted


@pytest.mark.parametrize("name", machine._NEEDED)
def test_a_package_that_training_needs(monkeypatch, name):
    there = machine.importlib.util.find_spec
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda wanted: None if wanted == name else there(wanted)
    )

    (finding,) = [f for f in machine.look() if f.what == "packages" and f.level is Level.FAIL]
    assert name in finding.told
