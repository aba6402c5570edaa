"""What `pip install octavo` brings: the files that are not Python, the metadata, the console command."""

import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import octavo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, so that the checkout stays as it is; by the setuptools that is here: no network."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("# octavo\n")
    shutil.copytree(ROOT / "octavo", copy / "octavo", ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
                "--no-index",
            ),
            *("--wheel-dir", str(out), str(copy)),
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(out.glob("octavo-*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel):
    ours = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "octavo").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert packed == ours
    assert "octavo/models/llama3/train_configs/demo.toml" in packed
    assert "octavo/assets/octavo_bpe_2048/tokenizer.json" in packed


def test_the_package_alone_needs_torch_only(metadata):
    needs = metadata.get_all("Requires-Dist")

    assert [need for need in needs if "extra ==" not in need] == ["torch>=2.11"]
    assert set(metadata.get_all("Provides-Extra")) == {"adam8bit", "docs", "gpu", "test", "train"}


def test_licence_and_version(wheel, metadata):
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Version"] == octavo.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert "octavo contributors" in wheel.read(licence).decode()


def test_the_console_command(wheel):
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "octavo = octavo.cli:main" in wheel.read(name).decode()


def test_assets_and_configs_are_found_where_the_package_is_installed(wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = (
        "from octavo import assets\nfrom octavo.launch import launcher\n"
        "from octavo.config import config_file\n"
        "print(*(path.exists() for path in [*assets.CORPORA.values(), *assets.TOKENIZERS.values()]))\n"
        "print((config_file.TRAIN_CONFIGS / launcher.DEFAULT_CONFIG).is_file(), launcher.__file__)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == f"True True\nTrue {tmp_path}/octavo/launch/launcher.py\n", ended.stderr
