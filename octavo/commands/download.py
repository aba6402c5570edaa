"""`octavo download`: fetches a tokenizer, a config or weights from the Hugging Face hub.

`octavo/hf/hub.py` implements the transfer; this module is the command. The token comes from HF_TOKEN or the
hub's own token file, never from a flag, because command lines are visible to all users of a machine and are
kept in shell histories. It is removed from every message.

Exit codes: 0; 2 for a wrong command line, access right or name; 1 for a network or disk failure; 130 for
Ctrl-C.
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

from octavo.commands.argparser import Parser, given_flags
from octavo.config import ConfigError
from octavo.core.format import format_bytes
from octavo.hf.hub import DownloadError, Hub, RemoteFile, download_file, redact_url

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
"""Kind of asset -> the paths that it consists of. `*` matches within one folder only."""


def read_token(environment: Mapping[str, str]) -> str | None:
    """Return the token in HF_TOKEN, else in the token file of Hugging Face's own tools, else None."""
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
    if not re.fullmatch(r"[\x21-\x7e]*", token):  # http.client's own error message would quote the value
        raise DownloadError(
            f"{source} holds a blank or a character that no token has; copy the token again", code=2
        )
    return token or None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if given_flags(argv) & {"hf_token", "token"}:
        raise DownloadError(
            "there is no flag for a token: a command line is visible to every user of the machine and kept "
            "in the shell's history. Set the variable HF_TOKEN",
            code=2,
        )
    parser = Parser(
        "octavo download",
        "Fetch files of a model from the Hugging Face hub.",
        "Environment: HF_TOKEN for gated repositories, HF_ENDPOINT for another hub.",
    )
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
        "--local_dir",
        type=Path,
        default=Path("assets/hf"),
        help="the parent of the new folder NAME (default: assets/hf)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    options = parser.read(argv)
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
            f"HF_ENDPOINT={redact_url(endpoint)}: expected an address such as {PUBLIC_HUB}", code=2
        )
    return endpoint


def _select(files: Sequence[RemoteFile], options: argparse.Namespace) -> list[RemoteFile]:
    patterns = [pattern for kind in options.assets for pattern in ASSETS[kind]]

    def matches(path: str) -> bool:
        return any(
            fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")
            for pattern in patterns
        )

    selected = [file for file in files if options.all or matches(file.path)]
    if not selected:
        listing = ", ".join(file.path for file in files[:12]) + (" …" if len(files) > 12 else "")
        raise DownloadError(
            f"{options.repo_id} has no files for --assets {' '.join(options.assets)} at {options.revision}; "
            f"it has {listing or 'no files'}",
            code=2,
        )
    return selected


def _check_space(files: Sequence[RemoteFile], folder: Path) -> None:
    needed = sum(file.size for file in files if not (folder / PurePosixPath(file.path)).exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder}: {format_bytes(needed)} are needed and {format_bytes(free)} are free; "
            "name another --local_dir"
        )


def _download(options: argparse.Namespace, endpoint: str, token: str | None) -> None:
    is_local = urllib.parse.urlsplit(endpoint).hostname in ("localhost", "127.0.0.1", "::1")
    if token is not None and endpoint.startswith("http:") and not is_local:
        print(
            f"octavo download: no token is sent to {redact_url(endpoint)}, which is not https",
            file=sys.stderr,
        )
        token = None
    hub = Hub(endpoint, options.repo_id, options.revision, token)
    files = _select(hub.list_files(), options)
    folder = options.local_dir / options.repo_id.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(files, folder)
        fetched = sum(download_file(hub, file, folder, sys.stdout) for file in files)
    except OSError as error:
        raise DownloadError(
            f"{error.filename or folder}: {error.strerror or error}; existing files are unchanged"
        ) from error
    print(f"{fetched} fetched, {len(files) - fetched} already there: {folder}")
    if "tokenizer" in options.assets:
        print(f"Train with it: --model.hf_assets_path={folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo download`; returns the exit code. An error is one message on stderr."""
    token = None
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        endpoint = _endpoint(os.environ)
        token = read_token(os.environ)
        _download(options, endpoint, token)
    except (DownloadError, ConfigError) as error:
        message = str(error) if token is None else str(error).replace(token, "***")
        print(f"octavo download: {message}", file=sys.stderr)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        print("\noctavo download: stopped; rerun the same command to continue", file=sys.stderr)
        return 130
    return 0
