"""The servers while a test runs, and the command that asks them."""

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from octavo.assets import TOKENIZERS
from octavo.commands import download
from octavo.hf import hub
from tests.commands.download.servers import REPOSITORY, SHARD, TOKEN, HubServer, Store, World
from tests.helpers.waiting import LIMIT


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
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", state.hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setattr(hub, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(hub, "TIMEOUT", LIMIT)
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
