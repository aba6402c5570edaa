"""The console command: its table, help and exit codes, and that it is free of torch until it trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import octavo
from octavo.cli import COMMANDS, Command, main
from octavo.config.schema import SECTIONS, JobConfig
from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).parents[2]
LLAMA3_8B = ROOT / "octavo/models/llama3/train_configs/llama3_8b.toml"


def run_python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT
    )


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in out
        assert command.help in out


def test_no_command_is_an_error_and_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: octavo" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"octavo {octavo.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian"], "octavo: no command 'trian'; did you mean 'train'?"),
        (["xyzzy"], "octavo: no command 'xyzzy' (octavo --help lists them)"),
        (["--verbose"], "octavo: no command '--verbose'"),
        (["--version", "extra"], "octavo: --version stands alone, but 'extra' follows it"),
        (
            ["train", "--training.seq_len=0"],
            "octavo: training.seq_len = 0 (--training.seq_len) must be at least 1",
        ),
        (["train", "--training.steps", "x"], "octavo: --training.steps: expected an integer, got 'x'"),
        (["train", "--model.converters=float8", "--float8.recipe_name=rowise"], "did you mean 'rowwise'?"),
        (["train", "--training.dataset=./nowhere"], "octavo: training.dataset = ./nowhere"),
        (["train", f"--job.config_file={LLAMA3_8B}"], "--repo_id meta-llama/Llama-3.1-8B --assets tokenizer"),
        (["train", "--training.enable_cpu_offload"], "needs a GPU, and this machine has none"),
    ],
)
def test_mistakes_end_in_exit_code_2_and_one_message(
    argv: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("octavo.launch.launcher.count_gpus", lambda environ: 0)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("octavo: ") == 1
    assert captured.out == ""


def test_the_number_of_processes_comes_from_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", "--training.global_batch_size=16"]) == 2
    assert "8 x 3 = 24" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["train"]) == 2
    assert "WORLD_SIZE=many: expected a whole number" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "9" * 5000)
    assert main(["train"]) == 2


def test_a_missing_package_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("octavo.cli.COMMANDS", {"train": Command("a_package.main", "trains")})
    assert main(["train", "--training.steps=1"]) == 2
    told = capsys.readouterr().err
    assert told == "octavo: the package a_package is not installed: pip install 'octavo[train]'\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    code = (
        "import sys\n"
        "from octavo import cli\n"
        "cli._prepare = lambda *_: lambda _: print('told', flush=True)\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT
        )
    assert done.returncode == 1
    assert done.stderr == "octavo: its output cannot be written: No space left on device\n"


def test_help_of_train_lists_every_key_with_its_default_once(tmp_path: Path) -> None:
    result = run_python("-m", "octavo.cli", "train", "--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    for section, keys in SECTIONS.items():
        for key in keys:
            named = [
                line
                for line in lines
                if line.startswith(f"  --{section}.{key}")
                and line.split()[0].rstrip(",") == f"--{section}.{key}"
            ]
            assert len(named) == 1, (section, key)


def test_loading_checking_and_helping_import_neither_torch_nor_numpy(tmp_path: Path) -> None:
    script = """
import json, os, sys
from octavo import cli, config, preflight
os.environ["CXX"] = "true"  # a compiler that starts, on any machine
job = config.load(["--training.compile", "--model.converters=float8"])
preflight.check(job, world_size=2, gpus=0)
cli.main(["--help"])
cli.main(["train", "--training.seq_len=0"])
try:
    cli.main(["train", "--help"])
except SystemExit:
    pass
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy"})))
"""
    result = run_python("-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_a_job_in_order_reaches_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[list[str]] = []

    class Trainer:
        @staticmethod
        def main(argv: list[str]) -> int:
            called.append(argv)
            return 7

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "octavo.train.trainer", Trainer)
    argv = ["--training.steps=3", "--job.description=two words"]
    assert main(["train", *argv]) == 7
    assert called == [argv]
    assert str(tmp_path) not in sys.path


def test_the_config_is_plain_data() -> None:
    assert json.loads(json.dumps(JobConfig().to_dict()))["training"]["seq_len"] == 2048
