"""Connections that break, servers that fail, disks that are full."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from octavo.commands import download
from tests.commands.download.servers import NAME, REPOSITORY, SHARD, WEIGHT_FILES, World, folder_content

CONFIG = f"/{REPOSITORY}/resolve/main/config.json"
BLOB = "/blob/model-00001-of-00002.safetensors"


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_tries_again(call: Any, world: World, status: int) -> None:
    world.failures = {CONFIG: [status, status], f"/api/models/{REPOSITORY}/tree/main": [status]}
    code, _, err = call("--assets", "config")
    assert code == 0
    assert err.count("retrying") == 3
    assert folder_content()["config.json"] == world.files["config.json"]


def test_asks_the_hub_anew_where_the_store_calls_its_address_stale(call: Any, world: World) -> None:
    world.failures = {BLOB: [403]}
    assert call("--assets", "safetensors")[0] == 0
    assert len(world.seen("hub", "00001")) == 2


def test_gives_up(call: Any, world: World) -> None:
    world.failures = {CONFIG: [503] * 9}
    code, _, err = call("--assets", "config")
    assert code == 1
    assert "answers 503 Service Unavailable, 4 times" in err
    assert "config.json" not in folder_content()


def test_goes_on_after_a_broken_connection(call: Any, world: World) -> None:
    world.failures = {BLOB: [lambda rest: rest[:1_000_000], lambda rest: rest[:500_000]]}
    assert call("--assets", "safetensors")[0] == 0
    assert folder_content() == {name: world.files[name] for name in WEIGHT_FILES}
    asked = [headers.get("range") for headers in world.seen("store", "00001")]
    assert asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_progress_starts_the_count_anew(call: Any, world: World) -> None:
    world.failures = {BLOB: [lambda rest: rest[:300_000]] * 8}
    assert call("--assets", "safetensors")[0] == 0


def test_goes_on_in_a_later_run(call: Any, world: World) -> None:
    world.failures = {BLOB: [lambda rest: rest[:1_000_000], 500, 500, 500, 500]}
    code, _, err = call("--assets", "safetensors")
    assert (code, "rerun the same command to continue" in err) == (1, True)
    there = folder_content()
    assert "model-00001-of-00002.safetensors" not in there
    (part,) = (name for name in there if name.endswith(".part"))
    assert there[part] == SHARD[:1_000_000]
    world.requests.clear()
    assert call("--assets", "safetensors")[0] == 0
    assert world.seen("store", "00001")[0]["range"] == "bytes=1000000-"
    assert folder_content() == {name: world.files[name] for name in WEIGHT_FILES}


def test_a_server_without_ranges(call: Any, world: World) -> None:
    world.ranges = False
    world.failures = {BLOB: [lambda rest: rest[:1_000_000]]}
    assert call("--assets", "safetensors")[0] == 0
    assert folder_content()["model-00001-of-00002.safetensors"] == SHARD


def test_a_part_with_a_wrong_beginning(call: Any, world: World) -> None:
    """It is found by the hash, thrown away and fetched anew."""
    name = "model-00001-of-00002.safetensors"
    folder = Path("assets/hf", NAME)
    folder.mkdir(parents=True)
    for wrong in (b"x" * 1_000_000, b"x" * len(SHARD), b"x" * (len(SHARD) + 5)):
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}.{hashlib.sha256(SHARD).hexdigest()[:12]}.part").write_bytes(wrong)
        assert call("--assets", "safetensors")[0] == 0
        assert folder_content()[name] == SHARD


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_flipped_bit(call: Any, world: World, name: str) -> None:
    def flip(rest: bytes) -> bytes:
        return bytes([rest[0] ^ 1]) + rest[1:]

    path = f"/blob/{name}" if name in world.large else f"/{REPOSITORY}/resolve/main/{name}"
    world.failures = {path: [flip]}
    assert call("--assets", "config", "safetensors")[0] == 0
    assert folder_content()[name] == world.files[name]
    Path("assets/hf", NAME, name).unlink()
    world.failures = {path: [flip, flip]}
    code, _, err = call("--assets", "config", "safetensors")
    assert (code, f"{name}: the content does not have the size and hash" in err) == (1, True)
    assert name not in folder_content()
    assert not any(file.endswith(".part") for file in folder_content())


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (
            [{"type": "file", "path": "config.json", "size": 5, "oid": "a" * 40}],
            "sends more than the 5 bytes that are listed",
        ),
        ({"error": "no"}, "not the hub's listing of files; is HF_ENDPOINT right?"),
    ],
)
def test_a_wrong_listing(call: Any, world: World, listing: Any, message: str) -> None:
    world.listing = listing
    code, _, err = call("--assets", "config")
    assert (code, message in err) == (1, True)


def test_no_network(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = call()
    assert code == 1
    assert "cannot be reached" in err
    assert "check the network" in err


def test_a_full_disk(call: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = download.shutil.disk_usage(".")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    code, _, err = call("--assets", "safetensors")
    assert (code, "5.9 MiB are needed and 976.6 KiB are free" in err) == (1, True)
    assert not world.seen("store")


def test_a_disk_that_fills_up(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    code, _, err = call("--assets", "config")
    assert (code, "No space left on device" in err) == (1, True)
