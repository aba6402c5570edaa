"""`octavo download` against two servers on this machine: a hub, and the store that it redirects to.

The law behind most tests in this folder: after any failure the folder holds whole, verified files or none of
that name, the message is one line without a traceback, and the token has been sent to the hub alone and
printed nowhere.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.commands import download
from octavo.tokenizer import build_tokenizer
from tests.commands.download.servers import (
    CONFIG_FILES,
    NAME,
    REPOSITORY,
    TOKEN,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    World,
    folder_content,
)
from tests.helpers.waiting import LIMIT


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], TOKENIZER_FILES),
        (["--assets", "tokenizer"], TOKENIZER_FILES),
        (["--assets=config"], CONFIG_FILES),
        (["--assets", "safetensors"], WEIGHT_FILES),
        (["--assets", "tokenizer", "config"], TOKENIZER_FILES | CONFIG_FILES),
        (["--assets", "config,safetensors"], CONFIG_FILES | WEIGHT_FILES),
    ],
)
def test_fetches_what_is_asked_for(call: Any, world: World, arguments: list[str], expected: set[str]) -> None:
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert folder_content() == {name: world.files[name] for name in expected}
    assert f"{len(expected)} fetched, 0 already there: assets/hf/{NAME}" in out


@pytest.mark.parametrize("pages", [1, 4])
def test_fetches_everything(call: Any, world: World, pages: int) -> None:
    world.pages = pages
    assert call("--all")[0] == 0
    assert folder_content() == world.files


def test_what_it_fetches_loads(call: Any) -> None:
    _, out, _ = call("--local_dir", "elsewhere")
    folder = f"elsewhere/{NAME}"
    assert f"--model.hf_assets_path={folder}" in out
    assert build_tokenizer(folder).vocab_size == 2048


def test_both_spellings_of_flags(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert download.main(["--repo-id", REPOSITORY, "--local-dir=my-dir", "--assets", "config"]) == 0
    assert Path("my-dir", NAME, "config.json").exists()


def test_what_is_there_is_not_fetched_again(call: Any, world: World) -> None:
    call()
    before = len(world.requests)
    changed = Path("assets/hf", NAME, "tokenizer_config.json")
    changed.write_bytes(changed.read_bytes().replace(b"begin", b"BEGIN"))  # the same size, another hash
    _, out, _ = call()
    assert "1 fetched, 3 already there" in out
    assert len(world.requests) == before + 2  # the listing and the changed file
    assert folder_content() == {name: world.files[name] for name in TOKENIZER_FILES}


def test_progress_is_rewritten_on_a_terminal_and_plain_elsewhere(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain, _ = call("--assets", "safetensors")
    assert "\r" not in plain
    assert "model-00001-of-00002.safetensors  100%  2.9 MiB of 2.9 MiB" in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, live, _ = call("--assets", "config")
    assert "\r\x1b[Kconfig.json  100%  23 bytes of 23 bytes" in live


def test_ctrl_c(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "download_file", interrupted)
    code, _, err = call()
    assert (code, "rerun the same command to continue" in err) == (130, True)


def test_as_a_command_of_octavo(world: World) -> None:
    """The whole way, in a separate process, which needs no torch."""
    command = "\n".join(
        [
            "import sys",
            "from octavo.cli import main",
            "code = main(sys.argv[1:])",
            "assert 'torch' not in sys.modules",
            "sys.exit(code)",
        ]
    )
    world.token = TOKEN

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", command, "download", *arguments],
            env={**os.environ, "HF_TOKEN": TOKEN},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert TOKEN not in done.stdout
        return done.stdout

    run("--repo_id", REPOSITORY)
    assert folder_content().keys() == TOKENIZER_FILES
    assert "HF_TOKEN" in run("--help")
