"""`octavo download`: fetches a tokenizer, a config or weights from the Hugging Face hub.

huggingface_hub talks to the hub. This module adds what its own downloads leave open:

- A file grows as `NAME.HASH.part`, which a later run continues. It takes its name only when its size and hash
  are those that the hub lists.
- The listing is not trusted: a path that leaves the folder, or contains control characters, is refused.
- The token comes from HF_TOKEN or the hub's own token file, never from a flag, because command lines are
  visible to all users of a machine and are kept in shell histories. It is not sent over plain http, and no
  message contains it.

Exit codes: 0; 2 for a wrong command line, access right or name; 1 for a network or disk failure; 130 for
Ctrl-C.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from octavo import __version__
from octavo.commands.argparser import Parser, given_flags
from octavo.config import ConfigError
from octavo.core.format import format_bytes
from octavo.core.secrets import SHOWN
from octavo.core.terminal import for_terminal

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

PUBLIC_HUB = "https://huggingface.co"

ASSETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tokenizer": (
            *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
            *("tokenizer.model", "original/tokenizer.model"),
        ),
        "config": ("config.json", "generation_config.json"),
        "safetensors": ("*.safetensors", "*.safetensors.index.json"),
    }
)
"""Kind of asset -> the paths that it consists of. `*` matches within one folder only."""

RETRY_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before a file is asked for again after a server error
_CHUNK = 1 << 20


class DownloadError(Exception):
    """A failed download that is not the user's mistake."""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if given_flags(argv) & {"hf_token", "token"}:
        raise ConfigError(
            "there is no flag for a token: a command line is visible to every user of the machine and kept "
            "in the shell's history. Set the variable HF_TOKEN"
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
        raise ConfigError(f"--assets {unknown[0]}: not one of {', '.join(ASSETS)}")
    name = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
    if not re.fullmatch(rf"({name}/)?{name}", options.repo_id) or ".." in options.repo_id:
        raise ConfigError(
            f"--repo_id {options.repo_id!a}: expected OWNER/NAME, as in meta-llama/Llama-3.1-8B"
        )
    return options


def _connect(environment: Mapping[str, str]) -> HfApi:
    """A client of the hub in HF_ENDPOINT, with the user's token."""
    from huggingface_hub import HfApi, get_token

    endpoint = (environment.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ConfigError(f"HF_ENDPOINT={_plain(endpoint)}: expected an address such as {PUBLIC_HUB}")
    token = get_token()
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):  # the client's own error would quote it
        raise ConfigError("HF_TOKEN holds a blank or a character that no token has; copy the token again")
    if token and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"octavo download: no token is sent to {endpoint}, which is not https", file=sys.stderr)
        token = None
    logging.getLogger("huggingface_hub").handlers = [_Notices(token)]
    return HfApi(endpoint, token=token or False)


def _list_files(hub: HfApi, options: argparse.Namespace) -> list[RepoFile]:
    """The files that `options` select, with their paths checked."""
    from huggingface_hub.hf_api import RepoFile

    tree = hub.list_repo_tree(options.repo_id, revision=options.revision, recursive=True)
    files = [file for file in tree if isinstance(file, RepoFile)]
    for file in files:
        _check_path(file.path)
    patterns = [pattern for kind in options.assets for pattern in ASSETS[kind]]

    def matches(path: str) -> bool:
        return any(
            fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")
            for pattern in patterns
        )

    selected = [file for file in files if options.all or matches(file.path)]
    if not selected:
        listing = ", ".join(file.path for file in files[:12]) + (" …" if len(files) > 12 else "")
        raise ConfigError(
            f"{options.repo_id} has no files for --assets {' '.join(options.assets)} at {options.revision}; "
            f"it has {listing or 'no files'}"
        )
    return selected


def _check_path(path: Any) -> None:
    """Refuse what is not a printable relative path inside a folder, like `../../.bashrc`."""
    plain = isinstance(path, str) and path.isprintable() and not re.search(r'[\\:*?"<>|]', path)
    if not plain or any(part in ("", ".", "..") or part.startswith("~") for part in path.split("/")):
        raise DownloadError(
            f"the hub lists a file named {path!a}, which is not a plain path inside a folder; refused"
        )


def _check_space(files: Sequence[RepoFile], folder: Path) -> None:
    needed = sum(file.size for file in files if not (folder / PurePosixPath(file.path)).exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder}: {format_bytes(needed)} are needed and {format_bytes(free)} are free; "
            "name another --local_dir"
        )


def _fetch(hub: HfApi, options: argparse.Namespace, file: RepoFile, folder: Path) -> bool:
    """Download `file` to `folder`; False if it is already there."""
    target = folder / PurePosixPath(file.path)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(f"{target.parent} is a link to outside of {folder}; refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and _is_intact(target, file):
        print(f"{file.path}  already there")
        return False
    part = target.with_name(f"{target.name}.{_expected_hash(file)[:12]}.part")
    _download_part(hub, options, file, part)
    if not _is_intact(part, file):
        part.unlink()
        raise DownloadError(
            f"{file.path}: the content does not have the size and hash that the hub lists; rerun the same "
            "command to fetch it anew"
        )
    os.replace(part, target)
    print(f"{file.path}  {format_bytes(file.size)}", flush=True)
    return True


class _Part(io.BufferedWriter):
    """The end of a file that grows to `size` bytes. A server that sends more is refused, not written."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(
            io.FileIO(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))
        )
        self._size = size

    def write(self, chunk: Any) -> int:
        if self.tell() + len(chunk) > self._size:
            raise DownloadError(f"the server sends more than the {self._size:,} bytes that are listed")
        return super().write(chunk)


def _download_part(hub: HfApi, options: argparse.Namespace, file: RepoFile, part: Path) -> None:
    """Append the rest of `file` to `part`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(options.repo_id, file.path, revision=options.revision, endpoint=hub.endpoint)
    headers = build_hf_headers(token=hub.token, library_name="octavo", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # a compressed answer cannot be continued
    for wait in (*RETRY_WAITS, None):
        with _Part(part, file.size) as stream:
            start = stream.tell()
            if start > file.size:
                start = stream.truncate(0)
            try:
                http_get(url, stream, resume_size=start, headers=headers, expected_size=file.size)
                break
            except HfHubHTTPError as error:
                status = error.response.status_code
                if wait is None or (status < 500 and _is_of_hub(error, hub)):
                    raise
        print(f"{file.path}: the server answers {status}; trying again in {wait:g} s", file=sys.stderr)
        time.sleep(wait)


def _is_of_hub(error: HfHubHTTPError, hub: HfApi) -> bool:
    """Whether the hub itself answered, and not the store that it redirects to, whose addresses grow stale."""
    return str(error.response.url).startswith(f"{hub.endpoint}/")


def _expected_hash(file: RepoFile) -> str:
    return file.blob_id if file.lfs is None else file.lfs.sha256


def _is_intact(path: Path, file: RepoFile) -> bool:
    """Whether the file has the listed size and hash."""
    if path.stat().st_size != file.size:
        return False
    git_blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    digest = git_blob if file.lfs is None else hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == _expected_hash(file)


def _download(hub: HfApi, options: argparse.Namespace) -> None:
    files = _list_files(hub, options)
    folder = options.local_dir / options.repo_id.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(files, folder)
    fetched = sum(_fetch(hub, options, file, folder) for file in files)
    print(f"{fetched} fetched, {len(files) - fetched} already there: {folder}")
    if "tokenizer" in options.assets:
        print(f"Train with it: --model.hf_assets_path={folder}")


def _explain(error: Exception, hub: HfApi, options: argparse.Namespace) -> tuple[int, str]:
    """The exit code and the message for what huggingface_hub, the network or the disk raised."""
    from huggingface_hub import errors

    repository, page = options.repo_id, f"{hub.endpoint}/{options.repo_id}"
    http = error if isinstance(error, errors.HfHubHTTPError) else None
    status = None if http is None else http.response.status_code
    if isinstance(error, errors.RevisionNotFoundError):
        return 2, f"{repository}: no revision {options.revision!a} at {hub.endpoint}"
    if isinstance(error, errors.GatedRepoError) or (http and status == 403 and _is_of_hub(http, hub)):
        reason = "the token was refused" if hub.token else "no token was sent"
        return 2, (
            f"no access to {repository} ({status}; {reason}): accept the licence at {page} and set HF_TOKEN "
            "to a token of that account with read access"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return 2, f"{page}: no such repository ({status}); check the name, and set HF_TOKEN if it is private"
    if status is not None:
        return 1, f"{page}: the server answers {status}; rerun the same command to continue"
    if isinstance(error, OSError) and error.errno is not None:
        return 1, f"{error.filename or options.local_dir}: {error.strerror}; existing files are unchanged"
    return 1, (
        f"{hub.endpoint} cannot be reached, or is no hub ({type(error).__name__}: {error}); check the "
        "network, HF_ENDPOINT and the proxy variables, then rerun the same command to continue"
    )


class _Notices(logging.Handler):
    """Prints what huggingface_hub logs: that it tries again, and why."""

    def __init__(self, token: str | None) -> None:
        super().__init__()
        self._token = token

    def emit(self, record: logging.LogRecord) -> None:
        print(f"octavo download: {_plain(record.getMessage(), self._token)}", file=sys.stderr)


def _plain(text: str, token: str | bool | None = None) -> str:
    """`text` without tokens, and addresses in it without user and query, which may be a signature."""
    text = text.replace(token, SHOWN) if isinstance(token, str) else text
    return for_terminal(re.sub(r"(?<=://)[^/\s@]*@|(?<=\S)\?\S+", "", text))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo download`; returns the exit code. An error is one message on stderr."""
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        hub = _connect(os.environ)
    except ConfigError as error:
        print(f"octavo download: {error}", file=sys.stderr)
        return 2
    try:
        _download(hub, options)
        return 0
    except ConfigError as error:
        code, message = 2, str(error)
    except DownloadError as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "stopped; rerun the same command to continue"
    except Exception as error:  # whatever the client raises is one message, without the token
        code, message = _explain(error, hub, options)
    print(f"octavo download: {_plain(message, hub.token)}", file=sys.stderr)
    return code
