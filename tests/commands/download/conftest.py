"""The servers while a test runs, and the command that asks them."""

import logging
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from octavo.assets import TOKENIZERS
from octavo.commands import download
from tests.commands.download.servers import REPOSITORY, SHARD, TOKEN, HubServer, Store, World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    shipped = TOKENIZERS["octavo_bpe_2048"]
    state = World(
        files={
            "README.md": b"# Llama",
            "config.json": b'{"model_type": "llama"}',
            "model-00001-of-00002.safetensors": SHARD,
            "model-00002-of-00002.safetensors": SHARD[::-1],
            "model.safetensors.index.json": b'{"weight_map": {}}',
            "original/tokenizer.model": b"IQ== 0\n" * 1000,
            "tokenizer.json": (shipped / "tokenizer.json").read_bytes(),
            "tokenizer_config.json": (shipped / "tokenizer_config.json").read_bytes(),
            "empty.txt": b"",
        },
        large={"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"},
    )
    servers = []
    for handler in (HubServer, Store):
        bound = type(handler.__name__, (handler,), {"world": state})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    # Another host name for the same machine: the token must not follow to it.
    state.hub, state.store = (
        f"http://127.0.0.1:{servers[0].server_port}",
        f"http://localhost:{servers[1].server_port}",
    )
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", state.hub)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between two tries
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])
    yield state
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def call(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command; gives (exit code, stdout, stderr) and holds that the token is in neither."""

    def run(*arguments: str, token: str | None = None) -> tuple[int, str, str]:
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        code = download.main(["--repo_id", REPOSITORY, *arguments])
        out, err = capsys.readouterr()
        for secret in (TOKEN, "signedsecret"):
            assert secret not in out + err
        assert "Traceback" not in err
        return code, out, err

    return run
