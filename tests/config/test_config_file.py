"""One name means one file, wherever it is given; what cannot be a file is told without a traceback."""

import os
import re
from pathlib import Path

import pytest

from octavo.config import ConfigError, load
from octavo.config.config_file import TRAIN_CONFIGS, find


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_shipped_name_is_found_unless_a_file_of_that_name_is_there(tmp_path: Path) -> None:
    assert find("demo.toml") == TRAIN_CONFIGS / "demo.toml"
    assert load(["--job.config_file=demo.toml"]).float8.recipe_name == "rowwise"
    (tmp_path / "demo.toml").write_text("[training]\nsteps = 3\n")
    assert find("demo.toml") == Path("demo.toml")
    assert load(["--job.config_file", "demo.toml"]).training.steps == 3


def test_only_a_bare_name_is_looked_up_among_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        find("./demo.toml")


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x.toml").write_text("[training]\nsteps = 4\n")
    job = load(["--config_file=~/x.toml"])
    assert job.training.steps == 4
    assert job.where["training.steps"] == f"{tmp_path}/home/x.toml:2"


BAD_NAMES = [
    ("", "name a file"),
    ("nowhere.toml", f"no such file in .*; octavo ships: debug_model.toml, .*{re.escape('demo.toml')}"),
    ("/dev/null/x", "no such file"),
    ("/", r"is a folder; name the \.toml file in it"),
    ("~nobody-of-this-name/x", "there is no home folder ~nobody-of-this-name"),
    ("a" * 300, "cannot be read: File name too long"),
    ("a\0b", "cannot be read: .*null"),
]


@pytest.mark.parametrize(("name", "told"), BAD_NAMES)
def test_what_cannot_be_a_file_is_one_line(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}"):
        find(name)
    with pytest.raises(ConfigError, match=f"^--config-file=.*: {told}") as caught:
        load([f"--config-file={name}"])
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipe_is_refused_and_no_file_at_all_is_the_defaults(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a pipe"):
        find("pipe")
    assert load(["--config_file=/dev/null"]).training == load([]).training
