"""What the hub refuses to give, and what the command refuses to ask for or to write."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from octavo.commands import download
from tests.commands.download.servers import NAME, REPOSITORY, TOKEN, World


def test_no_token(call: Any, world: World) -> None:
    world.token = TOKEN
    code, _, err = call()
    assert code == 2
    assert f"accept the licence at {world.hub}/{REPOSITORY} and set HF_TOKEN" in err
    assert "401; no token was sent" in err


@pytest.mark.parametrize(
    ("arguments", "options", "hub", "message"),
    [
        ([], {"token": TOKEN}, {"token": "hf_another"}, "403; the token was refused"),
        ([], {"repository": "nobody/nothing"}, {}, "nobody/nothing: no such repository"),
        (["--revision", "v9/x"], {}, {}, "no revision 'v9/x'"),
        (
            ["--assets", "config"],
            {},
            {"files": {"README.md": b"x"}},
            "has no files for --assets config at main; it has README.md",
        ),
        (["--assets", "weights"], {}, {}, "--assets weights: not one of tokenizer, config, safetensors"),
        (["--asets", "config"], {}, {}, "unrecognized arguments"),
        (["--revision"], {}, {}, "expected one argument"),
    ],
)
def test_exit_code_2(
    call: Any, world: World, arguments: list[str], options: dict[str, str], hub: dict[str, Any], message: str
) -> None:
    vars(world).update(hub)
    code, _, err = call(*arguments, **options)
    assert (code, message in err) == (2, True)


@pytest.mark.parametrize("repository", ["../../etc", "a/b/c", "a/..", "https://x/y", "a b/c", "-a/b"])
def test_a_wrong_name(world: World, repository: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert download.main([f"--repo_id={repository}"]) == 2
    assert "expected OWNER/NAME" in capsys.readouterr().err
    assert not world.requests


@pytest.mark.parametrize(
    "endpoint", ["ftp://x", "hub", "http://user:secretpart@host", "http://x/?q=secretpart"]
)
def test_a_wrong_endpoint(call: Any, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    code, _, err = call()
    assert (code, "HF_ENDPOINT=" in err, "secretpart" in err) == (2, True, False)


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
    assert (code, "a link to outside of" in err) == (1, True)
    assert not list((tmp_path / "outside").iterdir())
