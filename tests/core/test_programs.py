"""The commands in messages run as they stand; the compiler asked for is the one that inductor takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.core import programs
from octavo.core.programs import missing_cxx, octavo_command
from octavo.preflight.file_checks import download_command
from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).parents[2]


def program(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an environment in `a venv`, whose Python runs; PATH has the system alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    python = program(tmp_path / "a venv/bin/python", f'exec "{sys.executable}" "$@"')
    monkeypatch.setattr(sys, "executable", str(python))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("assets/hf/Llama-3.2-1B/", "--repo_id meta-llama/Llama-3.2-1B --assets tokenizer"),
        (
            "./assets/hf/Llama-3.1-8B/original/tokenizer.model",
            "--repo_id meta-llama/Llama-3.1-8B --assets tokenizer",
        ),
        ("./assets/hf/Llama-3.1-8B/tokenizer.json", "--repo_id meta-llama/Llama-3.1-8B --assets tokenizer"),
        ("/data/Llama-3.1-8B", "--repo_id meta-llama/Llama-3.1-8B --assets tokenizer --local_dir /data"),
        (
            "/my data/Meta-Llama-3-8B-Instruct",
            "--repo_id meta-llama/Meta-Llama-3-8B-Instruct --assets tokenizer --local_dir '/my data'",
        ),
    ],
)
def test_download_command(path: str, command: str) -> None:
    assert download_command(path) == f"{octavo_command()} download {command}"


@pytest.mark.parametrize("path", ["/nowhere", "assets/hf/other", "my-llama", "/data/Llama-3.1-8B; rm", "/"])
def test_no_repository_is_made_up(path: str) -> None:
    assert download_command(path) is None


def test_octavo_by_its_name_only_where_path_leads_to_this_environment(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = program(here / "a venv/bin/octavo")
    assert octavo_command() == "'a venv/bin/octavo'"

    monkeypatch.setenv("PATH", f"{here / 'a venv/bin'}:/bin")
    assert octavo_command() == "octavo"

    program(here / "other/octavo")
    monkeypatch.setenv("PATH", f"{here / 'other'}:{here / 'a venv/bin'}:/bin")
    assert octavo_command() == "'a venv/bin/octavo'"

    (here / "other/octavo").unlink()
    (here / "other/octavo").symlink_to(script)  # how tools that manage environments put a command on PATH
    assert octavo_command() == "octavo"


def test_a_checkout_without_a_script_is_called_through_its_python(here: Path) -> None:
    command = octavo_command()
    assert command == f"PYTHONPATH={ROOT} 'a venv/bin/python' -m octavo.cli"
    # In an environment without octavo: no PYTHONPATH but the command's own.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        f"{command} --version", shell=True, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert (ended.returncode, ended.stdout[:7]) == (0, "octavo "), ended.stderr


def test_in_the_checkout_itself_no_path_is_needed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert octavo_command() == f"'{here}/a venv/bin/python' -m octavo.cli"


@pytest.mark.parametrize(("platform", "default"), [("linux", "g++"), ("darwin", "clang++")])
def test_the_compiler_is_cxx_or_the_platforms_own(
    here: Path, monkeypatch: pytest.MonkeyPatch, platform: str, default: str
) -> None:
    monkeypatch.setattr(programs.sys, "platform", platform)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TORCH_INDUCTOR_INSTALL_GXX", raising=False)
    monkeypatch.setenv("PATH", str(here / "bin"))
    assert missing_cxx() == default
    program(here / "bin" / default, "exit 1")
    assert missing_cxx() == default, "a stub with nothing behind it"
    program(here / "bin" / default)
    assert missing_cxx() is None

    monkeypatch.setenv("CXX", "my-c++")
    assert missing_cxx() == "my-c++", "inductor does not fall back"
    program(here / "bin" / "my-c++")
    assert missing_cxx() is None


def test_inductor_may_fetch_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.sys, "platform", "linux")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_cxx() == "no-such-compiler"
    monkeypatch.setenv("TORCH_INDUCTOR_INSTALL_GXX", "1")
    assert missing_cxx() is None
