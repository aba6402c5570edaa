"""The token goes to the hub alone, and is printed nowhere."""

import http.client
import io
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from octavo.commands import download
from octavo.hf import hub
from tests.commands.download.servers import CONFIG_FILES, NAME, REPOSITORY, TOKEN, World, folder_content


def test_goes_to_the_hub_and_not_to_the_store(call: Any, world: World) -> None:
    world.token = TOKEN
    assert call("--assets", "safetensors", token=TOKEN)[0] == 0
    assert len(world.seen("store")) == 2
    assert all("authorization" not in headers for headers in world.seen("store"))
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in world.seen("hub"))


def test_follows_a_redirect_on_the_hub_itself(call: Any, world: World) -> None:
    world.token = TOKEN
    assert call("--assets", "config", repository=f"old-name/{NAME}", token=TOKEN)[0] == 0
    assert folder_content().keys() == CONFIG_FILES


def test_another_port_is_another_host(call: Any, world: World) -> None:
    world.token = TOKEN
    world.store = world.store.replace("localhost", "127.0.0.1")
    assert call("--assets", "safetensors", token=TOKEN)[0] == 0
    assert all("authorization" not in headers for headers in world.seen("store"))


def test_never_goes_from_https_to_an_open_address() -> None:
    request = urllib.request.Request("https://hub/x?q=signedsecret")
    request.add_unredirected_header("Authorization", f"Bearer {TOKEN}")
    follow = hub._RedirectHandler().redirect_request
    with pytest.raises(
        download.DownloadError, match=r"^https://hub/x redirects from https to an unencrypted address"
    ):
        follow(request, io.BytesIO(), 302, "", http.client.HTTPMessage(), "http://hub/x")
    store = follow(request, io.BytesIO(), 302, "", http.client.HTTPMessage(), "https://store/x")
    assert store is not None
    assert TOKEN not in str(store.header_items())


def test_from_the_hubs_own_file(call: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.token = TOKEN
    Path("home").mkdir()
    Path("home/token").write_text(TOKEN + "\n")
    monkeypatch.setenv("HF_HOME", "home")
    assert call("--assets", "config")[0] == 0
    monkeypatch.setenv("HF_TOKEN", "hf_other")  # the variable goes first
    assert call("--assets", "config")[0] == 2


@pytest.mark.parametrize("flag", ["--hf_token", "--hf-token", "--token", "--hf_token=x", "--token=x"])
def test_is_no_flag(call: Any, world: World, flag: str) -> None:
    code, _, err = call(*flag.replace("=x", f"={TOKEN}").split("!"), TOKEN)
    assert code == 2
    assert "there is no flag for a token" in err
    assert "HF_TOKEN" in err
    assert not world.requests


def test_of_impossible_letters_is_refused_before_it_is_quoted(call: Any, world: World) -> None:
    for token in (f"{TOKEN}\nX-Evil: 1", f"{TOKEN} ü"):
        code, _, err = call(token=token)
        assert (code, err.count("\n")) == (2, 1)
        assert "HF_TOKEN holds a blank or a character that no token has" in err
    assert not world.requests


def test_is_cut_out_of_messages(call: Any, world: World) -> None:
    """A server that echoes the token back in a header of its own."""
    world.large = set(world.files)
    world.redirect = f"gopher://store/{TOKEN}"
    code, _, err = call("--assets", "config", token=TOKEN)
    assert code == 1
    assert "gopher://store/*** answers 302 Found" in err
    world.listing = [{"type": "file", "path": f"../{TOKEN}", "size": 1}]
    code, _, err = call("--all", token=TOKEN)
    assert (code, "'../***'" in err) == (1, True)


def test_is_not_sent_in_the_clear(world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.invalid")
    tokens: list[str | None] = []

    def stop(self: Any, *_: Any) -> None:
        tokens.append(self._token)
        raise download.DownloadError("stop")

    monkeypatch.setattr(download.Hub, "list_files", stop)
    download.main(["--repo_id", REPOSITORY])
    assert tokens == [None]
    assert "no token is sent to http://mirror.invalid, which is not https" in capsys.readouterr().err
