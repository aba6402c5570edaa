"""`octavo download` against two servers on this machine: a hub, and the store that it redirects to.

The law behind most tests: after any failure the folder holds whole, verified files or none of that name, the
message is one line without a traceback, and the token has been sent to the hub alone and printed nowhere.
"""

import hashlib
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from octavo import download, hub
from octavo.assets import TOKENIZERS
from octavo.components.tokenizer import build_tokenizer

TOKEN = "hf_verysecret0123456789"
REPOSITORY = "meta-llama/Llama-3.1-8B"
NAME = "Llama-3.1-8B"
SHARD = bytes(range(256)) * 12_000  # 3 MB: several reads


@dataclass
class World:
    """What the servers have, do wrong and have seen. Every field may be changed by a test."""

    files: dict[str, bytes]
    large: set[str]  # kept in the store: redirected, with a SHA-256
    token: str | None = None  # required by the hub
    failures: dict[str, list[Any]] = field(default_factory=dict)  # path -> what the next answers do wrong
    listing: Any = None  # in place of the true one
    pages: int = 1
    ranges: bool = True
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # (server, path, headers)
    hub: str = ""
    store: str = ""
    redirect: str = ""  # in place of the store's address

    def seen(self, server: str, path: str = "") -> list[dict[str, str]]:
        return [headers for at, asked, headers in self.requests if at == server and path in asked]


class _Handler(BaseHTTPRequestHandler):
    """Common to hub and store."""

    world: World
    name: str

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.world.requests.append((self.name, self.path, {k.lower(): v for k, v in self.headers.items()}))
        wrong = self.world.failures.get(parts.path, [])
        failure = wrong.pop(0) if wrong else None
        if isinstance(failure, int):
            self.plain(failure, headers={"Retry-After": "0"})
        else:
            self.answer(parts.path, failure)

    def plain(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def content(self, body: bytes, failure: Any) -> None:
        """The body, or the part of it that a range asks for; `failure` is a function on what is sent."""
        start = 0
        if self.world.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.plain(416)
        rest = body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(failure(rest) if failure else rest)
        return None

    def answer(self, path: str, failure: Any) -> None:
        raise NotImplementedError


class _Store(_Handler):
    name = "store"

    def answer(self, path: str, failure: Any) -> None:
        self.content(self.world.files[path.removeprefix("/blob/")], failure)


class _Hub(_Handler):
    name = "hub"

    def answer(self, path: str, failure: Any) -> None:
        world = self.world
        if world.token is not None and self.headers.get("Authorization") != f"Bearer {world.token}":
            self.plain(403 if "Authorization" in self.headers else 401, headers={"X-Error-Code": "GatedRepo"})
        elif path == f"/api/models/{REPOSITORY}/tree/main":
            self.listing()
        elif path.startswith(f"/{REPOSITORY}/resolve/main/"):
            name = path.removeprefix(f"/{REPOSITORY}/resolve/main/")
            if name in world.large:
                address = world.redirect or f"{world.store}/blob/{name}?Signature=signedsecret"
                self.plain(302, headers={"Location": address})
            else:
                self.content(world.files[name], failure)
        elif path.startswith("/old-name/"):
            self.plain(307, headers={"Location": path.replace("/old-name/", "/meta-llama/")})
        elif path.startswith("/api/models/old-name/"):
            self.plain(307, headers={"Location": path.replace("old-name", "meta-llama")})
        elif path.startswith(f"/api/models/{REPOSITORY}/"):
            self.plain(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            self.plain(401, headers={"X-Error-Code": "RepoNotFound"})

    def listing(self) -> None:
        world = self.world
        entries: list[Any] = [{"type": "directory", "path": "original", "size": 0, "oid": "0" * 40}]
        for name, body in world.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            if name in world.large:
                entry["oid"] = "1" * 40
                entry["lfs"] = {
                    "oid": hashlib.sha256(body).hexdigest(),
                    "size": len(body),
                    "pointerSize": 134,
                }
            entries.append(entry)
        if world.listing is not None:
            entries = world.listing
        if world.pages > 1:
            page = int(urlsplit(self.path).query.partition("cursor=")[2] or 0)
            headers = {}
            if page + 1 < world.pages:
                headers["Link"] = f'<{world.hub}{urlsplit(self.path).path}?cursor={page + 1}>; rel="next"'
            return self.plain(200, json.dumps(entries[page :: world.pages]).encode(), headers)
        return self.plain(200, json.dumps(entries).encode())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    shipped = TOKENIZERS["octavo_bpe_2048"]
    state = World(
        files={
            "README.md": b"# Llama",
            "config.json": b'{"model_type": "llama"}',
            "generation_config.json": b'{"eos_token_id": 1}',
            "model-00001-of-00002.safetensors": SHARD,
            "model-00002-of-00002.safetensors": SHARD[::-1],
            "model.safetensors.index.json": b'{"weight_map": {}}',
            "original/consolidated.00.pth": b"pickle",
            "original/tokenizer.model": b"IQ== 0\n" * 1000,
            "special_tokens_map.json": b"{}",
            "tokenizer.json": (shipped / "tokenizer.json").read_bytes(),
            "tokenizer_config.json": (shipped / "tokenizer_config.json").read_bytes(),
            "empty.txt": b"",
        },
        large={"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"},
    )
    servers = []
    for handler in (_Hub, _Store):
        bound = type(handler.__name__, (handler,), {"world": state})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    # Another host name for the same machine: the token must not follow to it.
    state.hub, state.store = (
        f"http://127.0.0.1:{servers[0].server_port}",
        f"http://localhost:{servers[1].server_port}",
    )
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", state.hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setattr(hub, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(hub, "TIMEOUT", 5.0)
    monkeypatch.chdir(tmp_path)
    yield state
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def call(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command; gives (exit code, stdout, stderr) and holds that the token is in neither."""

    def run(*arguments: str, repository: str = REPOSITORY, token: str | None = None) -> tuple[int, str, str]:
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        code = download.main(["--repo_id", repository, *arguments])
        out, err = capsys.readouterr()
        for secret in (TOKEN, "signedsecret"):
            assert secret not in out + err
        assert "Traceback" not in err
        return code, out, err

    return run


def folder_content(name: str = NAME) -> dict[str, bytes]:
    root = Path("assets/hf") / name
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "original/tokenizer.model",
}
CONFIG_FILES = {"config.json", "generation_config.json"}
WEIGHT_FILES = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}


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


def test_fetches_everything(call: Any, world: World) -> None:
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


def test_a_listing_in_pages(call: Any, world: World) -> None:
    world.pages = 4
    assert call("--all")[0] == 0
    assert folder_content() == world.files


def test_what_is_there_is_not_fetched_again(call: Any, world: World) -> None:
    call()
    before = len(world.requests)
    changed = Path("assets/hf", NAME, "tokenizer_config.json")
    changed.write_bytes(changed.read_bytes().replace(b"begin", b"BEGIN"))  # the same size, another hash
    _, out, _ = call()
    assert "1 fetched, 3 already there" in out
    assert len(world.requests) == before + 2  # the listing and the changed file
    assert folder_content() == {name: world.files[name] for name in TOKENIZER_FILES}


class TestToken:
    def test_goes_to_the_hub_and_not_to_the_store(self, call: Any, world: World) -> None:
        world.token = TOKEN
        assert call("--assets", "safetensors", token=TOKEN)[0] == 0
        assert len(world.seen("store")) == 2
        assert all("authorization" not in headers for headers in world.seen("store"))
        assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in world.seen("hub"))

    def test_follows_a_redirect_on_the_hub_itself(self, call: Any, world: World) -> None:
        world.token = TOKEN
        assert call("--assets", "config", repository=f"old-name/{NAME}", token=TOKEN)[0] == 0
        assert folder_content().keys() == CONFIG_FILES

    def test_another_port_is_another_host(self, call: Any, world: World) -> None:
        world.token = TOKEN
        world.store = world.store.replace("localhost", "127.0.0.1")
        assert call("--assets", "safetensors", token=TOKEN)[0] == 0
        assert all("authorization" not in headers for headers in world.seen("store"))

    def test_never_goes_from_https_to_an_open_address(self) -> None:
        request = urllib.request.Request("https://hub/x?q=signedsecret")
        request.add_unredirected_header("Authorization", f"Bearer {TOKEN}")
        follow = hub._Redirects().redirect_request
        with pytest.raises(
            download.DownloadError, match=r"^https://hub/x redirects from https to an open address"
        ):
            follow(request, io.BytesIO(), 302, "", http.client.HTTPMessage(), "http://hub/x")
        store = follow(request, io.BytesIO(), 302, "", http.client.HTTPMessage(), "https://store/x")
        assert store is not None
        assert TOKEN not in str(store.header_items())

    def test_from_the_hubs_own_file(self, call: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        world.token = TOKEN
        Path("home").mkdir()
        Path("home/token").write_text(TOKEN + "\n")
        monkeypatch.setenv("HF_HOME", "home")
        assert call("--assets", "config")[0] == 0
        monkeypatch.setenv("HF_TOKEN", "hf_other")  # the variable goes first
        assert call("--assets", "config")[0] == 2

    @pytest.mark.parametrize("flag", ["--hf_token", "--hf-token", "--token", "--hf_token=x", "--token=x"])
    def test_is_no_flag(self, call: Any, world: World, flag: str) -> None:
        code, _, err = call(*flag.replace("=x", f"={TOKEN}").split("!"), TOKEN)
        assert code == 2
        assert "there is no flag for a token" in err
        assert "HF_TOKEN" in err
        assert not world.requests

    def test_of_impossible_letters_is_refused_before_it_is_quoted(self, call: Any, world: World) -> None:
        for token in (f"{TOKEN}\nX-Evil: 1", f"{TOKEN} ü"):
            code, _, err = call(token=token)
            assert (code, err.count("\n")) == (2, 1)
            assert "HF_TOKEN holds a blank or a character that no token has" in err
        assert not world.requests

    def test_is_cut_out_of_messages(self, call: Any, world: World) -> None:
        """A server that echoes the token back in a header of its own."""
        world.large = set(world.files)
        world.redirect = f"gopher://store/{TOKEN}"
        code, _, err = call("--assets", "config", token=TOKEN)
        assert code == 1
        assert "gopher://store/*** answers 302 Found" in err
        world.listing = [{"type": "file", "path": f"../{TOKEN}", "size": 1}]
        code, _, err = call("--all", token=TOKEN)
        assert (code, "'../***'" in err) == (1, True)

    def test_is_not_sent_in_the_clear(
        self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", "http://mirror.invalid")
        tokens: list[str | None] = []

        def stop(self: Any, *_: Any) -> None:
            tokens.append(self._token)
            raise download.DownloadError("stop")

        monkeypatch.setattr(download.Hub, "files", stop)
        download.main(["--repo_id", REPOSITORY])
        assert tokens == [None]
        assert "no token is sent to http://mirror.invalid, which is not https" in capsys.readouterr().err


class TestRefusals:
    def test_no_token(self, call: Any, world: World) -> None:
        world.token = TOKEN
        code, _, err = call()
        assert code == 2
        assert f"accept the licence at {world.hub}/{REPOSITORY} and set HF_TOKEN" in err
        assert "401; no token was sent" in err

    def test_a_token_without_the_right(self, call: Any, world: World) -> None:
        world.token = "hf_another"
        code, _, err = call(token=TOKEN)
        assert (code, "403; the token was refused" in err) == (2, True)

    def test_no_such_repository(self, call: Any) -> None:
        code, _, err = call(repository="nobody/nothing")
        assert (code, "nobody/nothing: no such repository" in err) == (2, True)

    def test_no_such_revision(self, call: Any) -> None:
        code, _, err = call("--revision", "v9/x")
        assert (code, "no revision 'v9/x'" in err) == (2, True)

    def test_a_repository_without_the_assets(self, call: Any, world: World) -> None:
        world.files = {"README.md": b"x"}
        code, _, err = call("--assets", "config")
        assert (code, "has nothing for --assets config at main; it has README.md" in err) == (2, True)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--assets", "weights"], "--assets weights: not one of tokenizer, config, safetensors"),
            (["--asets", "config"], "unrecognized arguments"),
            (["--revision"], "expected one argument"),
        ],
    )
    def test_a_wrong_command(self, call: Any, arguments: list[str], message: str) -> None:
        code, _, err = call(*arguments)
        assert (code, message in err) == (2, True)

    @pytest.mark.parametrize("repository", ["../../etc", "a/b/c", "a/..", "https://x/y", "a b/c", "-a/b"])
    def test_a_wrong_name(self, world: World, repository: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert download.main([f"--repo_id={repository}"]) == 2
        assert "expected OWNER/NAME" in capsys.readouterr().err
        assert not world.requests

    @pytest.mark.parametrize(
        "endpoint", ["ftp://x", "hub", "http://user:secretpart@host", "http://x/?q=secretpart"]
    )
    def test_a_wrong_endpoint(self, call: Any, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        code, _, err = call()
        assert (code, "HF_ENDPOINT=" in err, "secretpart" in err) == (2, True, False)


class TestBadConnections:
    CONFIG = f"/{REPOSITORY}/resolve/main/config.json"
    BLOB = "/blob/model-00001-of-00002.safetensors"

    @pytest.mark.parametrize("status", [500, 502, 503, 429])
    def test_tries_again(self, call: Any, world: World, status: int) -> None:
        world.failures = {self.CONFIG: [status, status], f"/api/models/{REPOSITORY}/tree/main": [status]}
        code, _, err = call("--assets", "config")
        assert code == 0
        assert err.count("trying again") == 3
        assert folder_content()["config.json"] == world.files["config.json"]

    def test_asks_the_hub_anew_where_the_store_calls_its_address_stale(self, call: Any, world: World) -> None:
        world.failures = {self.BLOB: [403]}
        assert call("--assets", "safetensors")[0] == 0
        assert len(world.seen("hub", "00001")) == 2

    def test_gives_up(self, call: Any, world: World) -> None:
        world.failures = {self.CONFIG: [503] * 9}
        code, _, err = call("--assets", "config")
        assert code == 1
        assert "answers 503 Service Unavailable, 4 times" in err
        assert "config.json" not in folder_content()

    def test_goes_on_after_a_broken_connection(self, call: Any, world: World) -> None:
        world.failures = {self.BLOB: [lambda rest: rest[:1_000_000], lambda rest: rest[:500_000]]}
        assert call("--assets", "safetensors")[0] == 0
        assert folder_content() == {name: world.files[name] for name in WEIGHT_FILES}
        asked = [headers.get("range") for headers in world.seen("store", "00001")]
        assert asked == [None, "bytes=1000000-", "bytes=1500000-"]

    def test_progress_starts_the_count_anew(self, call: Any, world: World) -> None:
        world.failures = {self.BLOB: [lambda rest: rest[:300_000]] * 8}
        assert call("--assets", "safetensors")[0] == 0

    def test_goes_on_in_a_later_run(self, call: Any, world: World) -> None:
        world.failures = {self.BLOB: [lambda rest: rest[:1_000_000], 500, 500, 500, 500]}
        code, _, err = call("--assets", "safetensors")
        assert (code, "goes on where it stopped" in err) == (1, True)
        there = folder_content()
        assert "model-00001-of-00002.safetensors" not in there
        (part,) = (name for name in there if name.endswith(".part"))
        assert there[part] == SHARD[:1_000_000]
        world.requests.clear()
        assert call("--assets", "safetensors")[0] == 0
        assert world.seen("store", "00001")[0]["range"] == "bytes=1000000-"
        assert folder_content() == {name: world.files[name] for name in WEIGHT_FILES}

    def test_a_server_without_ranges(self, call: Any, world: World) -> None:
        world.ranges = False
        world.failures = {self.BLOB: [lambda rest: rest[:1_000_000]]}
        assert call("--assets", "safetensors")[0] == 0
        assert folder_content()["model-00001-of-00002.safetensors"] == SHARD

    def test_a_part_with_a_wrong_beginning(self, call: Any, world: World) -> None:
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
    def test_a_flipped_bit(self, call: Any, world: World, name: str) -> None:
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

    def test_more_bytes_than_listed(self, call: Any, world: World) -> None:
        entry = {"type": "file", "path": "config.json", "size": 5, "oid": "a" * 40}
        world.listing = [entry]
        code, _, err = call("--assets", "config")
        assert (code, "sends more than the 5 bytes that are listed" in err) == (1, True)

    def test_no_network(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        code, _, err = call()
        assert code == 1
        assert "cannot be reached" in err
        assert "check the network" in err

    def test_not_a_hub(self, call: Any, world: World) -> None:
        world.listing = {"error": "no"}
        code, _, err = call()
        assert (code, "not the hub's listing of files; is HF_ENDPOINT right?" in err) == (1, True)

    def test_a_full_disk(self, call: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = download.shutil.disk_usage(".")
        monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
        code, _, err = call("--assets", "safetensors")
        assert (code, "6.1 MB are needed and 1.0 MB are free" in err) == (1, True)
        assert not world.seen("store")

    def test_a_disk_that_fills_up(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(download.os, "fsync", full)
        code, _, err = call("--assets", "config")
        assert (code, "No space left on device" in err) == (1, True)


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "a/../../evil",
        "/etc/evil",
        "a//b",
        "./a",
        "~/evil",
        "a\\..\\evil",
        "C:evil",
        "a\x1b[2J",
        "a\nb",
        "",
    ],
)
def test_a_hostile_listing_is_refused(call: Any, world: World, path: str, tmp_path: Path) -> None:
    world.listing = [
        {"type": "file", "path": path, "size": 4, "oid": hashlib.sha1(b"blob 4\0evil").hexdigest()}
    ]
    code, _, err = call("--all")
    assert (code, "refused" in err, "\x1b" in err) == (1, True, False)
    assert not list(tmp_path.rglob("*evil*"))
    assert len(world.requests) == 1


def test_a_link_out_of_the_folder_is_refused(call: Any, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    folder = Path("assets/hf", NAME)
    folder.mkdir(parents=True)
    (folder / "original").symlink_to(tmp_path / "outside")
    code, _, err = call()
    assert (code, "a link that leads out" in err) == (1, True)
    assert not list((tmp_path / "outside").iterdir())


def test_progress_is_rewritten_on_a_terminal_and_plain_elsewhere(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain, _ = call("--assets", "safetensors")
    assert "\r" not in plain
    assert "model-00001-of-00002.safetensors  100%  3.1 MB of 3.1 MB" in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, live, _ = call("--assets", "config")
    assert "\r\x1b[Kconfig.json  100%  23 B of 23 B" in live


def test_ctrl_c(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "fetch", interrupted)
    code, _, err = call()
    assert (code, "the same command goes on where it stopped" in err) == (130, True)


def test_as_a_command_of_octavo(world: World) -> None:
    """The whole way, in a process of its own that needs no torch."""
    command = "\n".join(
        [
            "import sys",
            "from octavo.cli import main",
            "code = main(sys.argv[1:])",
            "assert 'torch' not in sys.modules",
            "sys.exit(code)",
        ]
    )
    environment = {**os.environ, "HF_TOKEN": TOKEN}
    world.token = TOKEN
    arguments = [sys.executable, "-c", command, "download", "--repo_id", REPOSITORY]
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert TOKEN not in run.stdout
    assert folder_content().keys() == TOKENIZER_FILES
    helped = subprocess.run(
        [*arguments[:4], "--help"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (helped.returncode, "HF_TOKEN" in helped.stdout, TOKEN in helped.stdout) == (0, True, False)
