"""`octavo download` against two servers on this machine: a hub, and the store that it redirects to.

The law behind the tests in this folder: after any failure the folder holds whole, verified files or none of
that name, the message is one line without a traceback, and the token has been sent to the hub alone and
printed nowhere.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.commands import download
from octavo.tokenizer import build_tokenizer
from tests.commands.download.servers import NAME, REPOSITORY, SHARD, TOKEN, World, folder_content
from tests.helpers.waiting import LIMIT

CONFIG = f"/{REPOSITORY}/resolve/main/config.json"
BLOB = "/blob/model-00001-of-00002.safetensors"
PART = f"model-00001-of-00002.safetensors.{hashlib.sha256(SHARD).hexdigest()[:12]}.part"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "original/tokenizer.model"}
CONFIG_FILES = {"config.json"}
WEIGHT_FILES = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], TOKENIZER_FILES),
        (["--assets=config"], CONFIG_FILES),
        (["--assets", "tokenizer", "config"], TOKENIZER_FILES | CONFIG_FILES),
        (["--assets", "config,safetensors"], CONFIG_FILES | WEIGHT_FILES),
    ],
    ids=["tokenizer", "config", "two-words", "comma"],
)
def test_fetches_what_is_asked_for(call: Any, world: World, arguments: list[str], expected: set[str]) -> None:
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert folder_content() == {name: world.files[name] for name in expected}
    assert f"{len(expected)} fetched, 0 already there: assets/hf/{NAME}" in out


def test_fetches_everything_that_several_pages_list(call: Any, world: World) -> None:
    world.pages = 4
    assert call("--all", "--local-dir=elsewhere")[0] == 0
    assert folder_content("elsewhere") == world.files
    assert build_tokenizer(f"elsewhere/{NAME}").vocab_size == 2048


def test_what_is_there_is_not_fetched_again(call: Any, world: World) -> None:
    call()
    world.requests.clear()
    changed = Path("assets/hf", NAME, "tokenizer_config.json")
    changed.write_bytes(changed.read_bytes().replace(b"begin", b"BEGIN"))  # the same size, another hash
    assert "1 fetched, 2 already there" in call()[1]
    assert len(world.seen("hub", "/resolve/")) == 1
    assert folder_content() == {name: world.files[name] for name in TOKENIZER_FILES}


# Connections that break, and what comes wrong


def test_tries_again_after_server_errors(call: Any, world: World) -> None:
    world.failures = {CONFIG: [500, 503, 429], f"/api/models/{REPOSITORY}/tree/main": [502]}
    code, _, err = call("--assets", "config")
    assert (code, err.count("trying again in"), "retry" in err) == (0, 2, True)
    assert folder_content()["config.json"] == world.files["config.json"]
    world.failures = {CONFIG: [503] * 9}
    Path("assets/hf", NAME, "config.json").unlink()
    code, _, err = call("--assets", "config")
    assert (code, "answers 503; rerun the same command to continue" in err) == (1, True)
    assert "config.json" not in folder_content()


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_after_a_broken_connection(call: Any, world: World, ranges: bool) -> None:
    world.ranges = ranges
    world.failures = {BLOB: [lambda rest: rest[:1_000_000], lambda rest: rest[:500_000]]}
    assert call("--assets", "safetensors")[0] == 0
    assert folder_content() == {name: world.files[name] for name in WEIGHT_FILES}
    asked = [headers.get("range") for headers in world.seen("store", "00001")]
    assert asked == [None, "bytes=1000000-", "bytes=1500000-" if ranges else "bytes=500000-"]


def test_goes_on_in_a_later_run(call: Any, world: World) -> None:
    """Also after the store has called its address stale once too often."""
    world.failures = {BLOB: [lambda rest: rest[:1_000_000], *[403] * 5]}
    code, _, err = call("--assets", "safetensors")
    assert (code, "the server answers 403" in err) == (1, True)
    assert folder_content()[PART] == SHARD[:1_000_000]
    world.failures = {BLOB: [403]}
    world.requests.clear()
    assert call("--assets", "safetensors")[0] == 0
    assert len(world.seen("hub", "00001")) == 2  # asked for a new address
    assert world.seen("store", "00001")[0]["range"] == "bytes=1000000-"
    assert folder_content() == {name: world.files[name] for name in WEIGHT_FILES}


@pytest.mark.parametrize("wrong", [b"x" * 1_000_000, b"x" * len(SHARD)], ids=["short", "whole"])
def test_a_part_with_a_wrong_beginning_is_fetched_anew(call: Any, world: World, wrong: bytes) -> None:
    Path("assets/hf", NAME).mkdir(parents=True)
    Path("assets/hf", NAME, PART).write_bytes(wrong)
    code, _, err = call("--assets", "safetensors")
    assert (code, "does not have the size and hash" in err) == (1, True)
    assert call("--assets", "safetensors")[0] == 0
    assert folder_content() == {name: world.files[name] for name in WEIGHT_FILES}


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_flipped_bit(call: Any, world: World, name: str) -> None:
    path = f"/blob/{name}" if name in world.large else f"/{REPOSITORY}/resolve/main/{name}"
    world.failures = {path: [lambda rest: bytes([rest[0] ^ 1]) + rest[1:]]}
    code, _, err = call("--assets", "config", "safetensors")
    assert (code, f"{name}: the content does not have the size and hash" in err) == (1, True)
    assert not [file for file in folder_content() if file.startswith(name)]


def test_more_than_is_listed_is_not_written(call: Any, world: World) -> None:
    world.listing = [{"type": "file", "path": "config.json", "size": 5, "oid": "a" * 40}]
    code, _, err = call("--assets", "config")
    assert (code, "sends more than the 5 bytes that are listed" in err) == (1, True)
    assert all(len(content) <= 5 for content in folder_content().values())


@pytest.mark.parametrize("listing", [{"error": "no"}, ["x"], [{"type": "file", "path": "a"}], None])
def test_a_server_that_is_no_hub(call: Any, world: World, listing: Any) -> None:
    world.listing = listing
    if listing is None:
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the fixture puts it back
    code, _, err = call("--assets", "config")
    assert (code, "cannot be reached, or is no hub" in err, "check the network" in err) == (1, True, True)


def test_a_full_disk(call: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = download.shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
        code, _, err = call("--assets", "safetensors")
    assert (code, "5.9 MiB are needed and 976.6 KiB are free" in err) == (1, True)
    assert not world.seen("store")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download._Part, "write", full)
    code, _, err = call("--assets", "config")
    assert (code, "No space left on device" in err) == (1, True)


def test_ctrl_c(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download._Part, "write", interrupted)
    code, _, err = call()
    assert (code, "rerun the same command to continue" in err) == (130, True)


# What the hub refuses to give, and what the command refuses to ask for or to write


def test_no_access(call: Any, world: World) -> None:
    world.token = TOKEN
    code, _, err = call()
    assert code == 2
    assert f"accept the licence at {world.hub}/{REPOSITORY} and set HF_TOKEN" in err
    assert "401; no token was sent" in err
    world.token = "hf_another"
    code, _, err = call(token=TOKEN)
    assert (code, "403; the token was refused" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repo_id=nobody/nothing"], "nobody/nothing: no such repository"),
        (["--revision", "v9/x"], "no revision 'v9/x'"),
        (["--assets", "weights"], "--assets weights: not one of tokenizer, config, safetensors"),
        (["--asets", "config"], "unrecognized arguments"),
        (["--repo_id=../../etc"], "expected OWNER/NAME"),
        (["--repo_id=a/.."], "expected OWNER/NAME"),
        (["--repo_id=https://x/y"], "expected OWNER/NAME"),
        (["--hf_token", TOKEN], "there is no flag for a token"),
        ([f"--token={TOKEN}"], "there is no flag for a token"),
    ],
)
def test_exit_code_2(call: Any, arguments: list[str], message: str) -> None:
    code, _, err = call(*arguments)
    assert (code, message in err) == (2, True)


def test_a_repository_without_such_files(call: Any, world: World) -> None:
    world.files = {"README.md": b"x"}
    code, _, err = call("--assets", "config")
    assert (code, "has no files for --assets config at main; it has README.md" in err) == (2, True)


@pytest.mark.parametrize(
    "endpoint", ["ftp://x", "hub", "http://user:secretpart@host", "http://x/?q=secretpart"]
)
def test_a_wrong_endpoint(call: Any, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    code, _, err = call()
    assert (code, "HF_ENDPOINT=" in err, "secretpart" in err) == (2, True, False)


HOSTILE = ["../evil", "a/../../evil", "/etc/evil", "a//b", "~/evil", "a\\..\\evil", "C:evil", "a\x1b[2J", ""]


@pytest.mark.parametrize("path", HOSTILE, ids=ascii)
def test_a_hostile_listing_is_refused(call: Any, world: World, path: str, tmp_path: Path) -> None:
    oid = hashlib.sha1(b"blob 4\0evil").hexdigest()
    world.listing = [{"type": "file", "path": path, "size": 4, "oid": oid}]
    code, _, err = call("--all")
    assert (code, "refused" in err, "\x1b" in err) == (1, True, False)
    assert not list(tmp_path.rglob("*evil*"))
    assert not world.seen("hub", "/resolve/")


def test_a_link_out_of_the_folder_is_refused(call: Any, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    Path("assets/hf", NAME).mkdir(parents=True)
    Path("assets/hf", NAME, "original").symlink_to(tmp_path / "outside")
    code, _, err = call()
    assert (code, "a link to outside of" in err) == (1, True)
    assert not list((tmp_path / "outside").iterdir())
    Path("assets/hf", NAME, PART).symlink_to(tmp_path / "outside/evil")
    assert call("--assets", "safetensors")[0] == 1
    assert not list((tmp_path / "outside").iterdir())


# The token


@pytest.mark.parametrize("store", ["localhost", "127.0.0.1"])
def test_the_token_goes_to_the_hub_and_not_to_the_store(call: Any, world: World, store: str) -> None:
    """Another name for the host, or only another port."""
    world.token, world.store = TOKEN, world.store.replace("localhost", store)
    assert call("--assets", "safetensors", token=TOKEN)[0] == 0
    assert len(world.seen("store")) == 2
    assert all("authorization" not in headers for headers in world.seen("store"))
    assert len(world.seen("hub", "/resolve/")) == 3
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in world.seen("hub", "/resolve/"))


def test_the_token_follows_a_redirect_on_the_hub_itself(call: Any, world: World) -> None:
    world.token = TOKEN
    assert call("--assets", "config", f"--repo_id=old-name/{NAME}", token=TOKEN)[0] == 0
    assert folder_content().keys() == CONFIG_FILES


def test_the_token_from_the_hubs_own_file(call: Any, world: World, tmp_path: Path) -> None:
    world.token = TOKEN
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert call("--assets", "config")[0] == 0
    assert call("--assets", "config", token="hf_other")[0] == 2  # the variable goes first


def test_a_token_of_impossible_letters_is_refused_before_it_is_quoted(call: Any, world: World) -> None:
    code, _, err = call(token=f"{TOKEN} ü")
    assert (code, err.count("\n")) == (2, 1)
    assert "HF_TOKEN holds a blank or a character that no token has" in err
    assert not world.requests


def test_the_token_is_cut_out_of_messages(call: Any, world: World) -> None:
    """A server that echoes the token back: in the address of a redirect, and in its listing."""
    world.large = set(world.files)
    world.redirect = f"gopher://{TOKEN}/x"
    assert call("--assets", "config", token=TOKEN)[0] == 1
    world.listing = [{"type": "file", "path": f"../{TOKEN}", "size": 1, "oid": "a"}]
    code, _, err = call("--all", token=TOKEN)
    assert (code, "'../***'" in err) == (1, True)


def test_the_token_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = download._connect({"HF_ENDPOINT": "http://mirror.invalid"})
    assert hub.token is False
    assert "no token is sent to http://mirror.invalid, which is not https" in capsys.readouterr().err


def test_as_a_command_of_octavo(world: World) -> None:
    """The whole way, in a separate process, which needs no torch."""
    command = "import sys; from octavo.cli import main; code = main(sys.argv[1:]); "
    command += "assert 'torch' not in sys.modules; sys.exit(code)"
    world.token = TOKEN
    done = subprocess.run(
        [sys.executable, "-c", command, "download", "--repo_id", REPOSITORY],
        env={**os.environ, "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert TOKEN not in done.stdout
    assert folder_content().keys() == TOKENIZER_FILES
