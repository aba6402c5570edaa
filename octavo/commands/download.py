"""`octavo download`: a tokenizer, a config or weights from the Hugging Face hub.

What the hub is and how a file comes from it is `octavo/hf/hub.py`; here is the command. The token comes from
HF_TOKEN or the hub's own token file, never from a flag (command lines are seen by all users of a machine
and kept in histories), and is cut out of every message.

Exit codes: 0; 2 where the command, the rights or the name are wrong; 1 where the network or the disk is; 130
for Ctrl-C.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NoReturn

from octavo.hf.hub import DownloadError, Hub, RemoteFile, amount, fetch, shown

PUBLIC_HUB = "https://huggingface.co"

ASSETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tokenizer": (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "tokenizer.model",
            "original/tokenizer.model",
        ),
        "config": ("config.json", "generation_config.json"),
        "safetensors": ("*.safetensors", "*.safetensors.index.json"),
    }
)
"""Kind of asset -> the paths it consists of. `*` stands for a name, never for a folder."""


def read_token(environment: Mapping[str, str]) -> str | None:
    """The hub's token: HF_TOKEN, else the file in which the hub's own tools keep it, else None."""
    token, source = environment.get("HF_TOKEN", ""), "HF_TOKEN"
    if not token:
        cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home = Path(environment.get("HF_HOME") or cache / "huggingface").expanduser()
        path = Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser()
        source = str(path)
        try:
            token = path.read_text()
        except (OSError, UnicodeDecodeError):
            return None
    token = token.strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):  # http.client would quote the value in its complaint
        raise DownloadError(
            f"{source} holds a blank or a character that no token has; copy the token again", code=2
        )
    return token or None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DownloadError(f"{message} (octavo download --help)", code=2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `-` and `_` in flags are the same."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(
            name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word
        )
    if any(word.partition("=")[0] in ("--hf_token", "--token") for word in words):
        raise DownloadError(
            "there is no flag for a token: a command line is seen by every user of the machine and kept in "
            "the shell's history. Set the variable HF_TOKEN",
            code=2,
        )
    parser = _Parser(prog="octavo download", description="Fetch files of a model from the Hugging Face hub.")
    parser.add_argument(
        "--repo_id", required=True, metavar="OWNER/NAME", help="for example meta-llama/Llama-3.1-8B"
    )
    parser.add_argument(
        "--assets",
        nargs="+",
        default=["tokenizer"],
        metavar="KIND",
        help=f"{', '.join(ASSETS)} (default: tokenizer)",
    )
    parser.add_argument("--all", action="store_true", help="every file of the repository")
    parser.add_argument(
        "--local_dir", type=Path, default=Path("assets/hf"), help="default: assets/hf; NAME is added"
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    parser.epilog = "Environment: HF_TOKEN for closed repositories, HF_ENDPOINT for another hub."
    options = parser.parse_args(words)
    options.assets = [kind for word in options.assets for kind in word.split(",") if kind]
    if unknown := [kind for kind in options.assets if kind not in ASSETS]:
        raise DownloadError(f"--assets {unknown[0]}: not one of {', '.join(ASSETS)}", code=2)
    name = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
    if not re.fullmatch(rf"({name}/)?{name}", options.repo_id) or ".." in options.repo_id:
        raise DownloadError(
            f"--repo_id {options.repo_id!r}: expected OWNER/NAME, as in meta-llama/Llama-3.1-8B", code=2
        )
    return options


def _endpoint(environment: Mapping[str, str]) -> str:
    endpoint = environment.get("HF_ENDPOINT") or PUBLIC_HUB
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise DownloadError(
            f"HF_ENDPOINT={shown(endpoint)}: expected an address such as {PUBLIC_HUB}", code=2
        )
    return endpoint


def _choose(files: Sequence[RemoteFile], options: argparse.Namespace) -> list[RemoteFile]:
    patterns = [pattern for kind in options.assets for pattern in ASSETS[kind]]

    def wanted(path: str) -> bool:
        return any(
            fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")
            for pattern in patterns
        )

    chosen = [file for file in files if options.all or wanted(file.path)]
    if not chosen:
        there = ", ".join(file.path for file in files[:12]) + (" …" if len(files) > 12 else "") or "no files"
        raise DownloadError(
            f"{options.repo_id} has nothing for --assets {' '.join(options.assets)} at {options.revision}; "
            f"it has {there}",
            code=2,
        )
    return chosen


def _check_space(files: Sequence[RemoteFile], folder: Path) -> None:
    need = sum(file.size for file in files if not (folder / PurePosixPath(file.path)).exists())
    have = shutil.disk_usage(folder).free
    if need > have:
        raise DownloadError(
            f"{folder}: {amount(need)} are needed and {amount(have)} are free; name another --local_dir"
        )


def _run(options: argparse.Namespace, endpoint: str, token: str | None) -> None:
    local = urllib.parse.urlsplit(endpoint).hostname in ("localhost", "127.0.0.1", "::1")
    if token is not None and endpoint.startswith("http:") and not local:
        print(f"octavo download: no token is sent to {shown(endpoint)}, which is not https", file=sys.stderr)
        token = None
    hub = Hub(endpoint, options.repo_id, options.revision, token)
    files = _choose(hub.files(), options)
    folder = options.local_dir / options.repo_id.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(files, folder)
        fetched = sum(fetch(hub, file, folder, sys.stdout) for file in files)
    except OSError as error:
        raise DownloadError(
            f"{error.filename or folder}: {error.strerror or error}; nothing that was there is lost"
        ) from error
    print(f"{fetched} fetched, {len(files) - fetched} already there: {folder}")
    if "tokenizer" in options.assets:
        print(f"Train with it: --model.hf_assets_path={folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """`octavo download`: the exit code. Errors are one message on stderr."""
    token = None
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        endpoint = _endpoint(os.environ)
        token = read_token(os.environ)
        _run(options, endpoint, token)
    except DownloadError as error:
        message = str(error) if token is None else str(error).replace(token, "***")
        print(f"octavo download: {message}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\noctavo download: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0
