"""A client of the Hugging Face hub that uses only the standard library.

`{endpoint}/api/models/{repo}/tree/{revision}` lists names, sizes and hashes;
`{endpoint}/{repo}/resolve/{revision}/{path}` returns a file or redirects to the store that has it.

- The token gives access to the user's account. It is sent only to the endpoint's own host, and never along a
  redirect or over plain http.
- Connections break. A file grows as `NAME.HASH.part` and is continued by a range request, in this run or a
  later one. When its size and hash are right it is renamed.
- The listing is not trusted. A path that leaves the folder, or contains control characters, stops the
  download.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from octavo import __version__
from octavo.core.format import format_bytes

T = TypeVar("T")

TIMEOUT = 30.0  # seconds without a byte
RETRY_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry; a try that received bytes resets the count
_CHUNK = 1 << 20
_LISTING_LIMIT = 64 << 20


class DownloadError(Exception):
    """A failed download: a message for the user, and the command's exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class _TransientError(Exception):
    """A failure that may pass: the message if it does not, and the seconds that the server asks to wait."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        path: relative to the repository, checked by `check_path`.
        size: in bytes.
        sha256: of the content, if the file is in the hub's large-file store; else None.
        git_sha1: of the content as a git blob, if the file is in git; else None.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None

    def new_hash(self) -> hashlib._Hash | None:
        """A hash object to update with the content, or None if the hub lists no hash."""
        if self.sha256 is not None:
            return hashlib.sha256()
        if self.git_sha1 is not None:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return None

    @property
    def expected_hash(self) -> str | None:
        return self.sha256 or self.git_sha1


def check_path(path: str) -> str:
    """`path` if it is a printable relative path inside a folder; `DownloadError` for one like
    `../../.bashrc`.
    """
    parts = path.split("/")
    plain = path.isprintable() and not any(letter in path for letter in '\\:*?"<>|')
    if not plain or any(part in ("", ".", "..") or part.startswith("~") for part in parts):
        raise DownloadError(
            f"the hub lists a file named {path!a}, which is not a plain path inside a folder; refused"
        )
    return path


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token is sent only to the original host."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.type == "https" and not newurl.startswith("https:"):
            raise DownloadError(
                f"{redact_url(req.full_url)} redirects from https to an unencrypted address; refused"
            )
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        authorization = req.unredirected_hdrs.get("Authorization")
        if following is not None and authorization is not None and _origin(newurl) == _origin(req.full_url):
            following.add_unredirected_header("Authorization", authorization)
        return following


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def redact_url(url: str) -> str:
    """`url` without its query and user, which may contain a signature or a password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Hub:
    """One repository at one revision.

    Args:
        endpoint: scheme and host, and a path if the hub is below one.
    """

    def __init__(self, endpoint: str, repository: str, revision: str, token: str | None) -> None:
        self.endpoint, self.repository, self.revision = endpoint.rstrip("/"), repository, revision
        self._token = token
        self._open = urllib.request.build_opener(_RedirectHandler()).open

    def web_page(self) -> str:
        """The repository's page, where users accept its licence."""
        return f"{self.endpoint}/{self.repository}"

    def list_files(self) -> list[RemoteFile]:
        """All files, sorted by path."""
        revision = urllib.parse.quote(self.revision, safe="")
        url: str | None = f"{self.endpoint}/api/models/{self.repository}/tree/{revision}?recursive=true"
        found: list[RemoteFile] = []
        while url is not None:
            entries, url = _with_retries(partial(self._fetch_listing_page, url))
            found += [_remote_file(entry) for entry in entries if entry.get("type") == "file"]
        return sorted(found, key=lambda file: file.path)

    def _fetch_listing_page(self, url: str) -> tuple[list[dict[str, Any]], str | None]:
        with self.open(url) as response:
            content = response.read(_LISTING_LIMIT)
            following = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link", ""))
        try:
            entries = json.loads(content)
        except ValueError:
            entries = None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DownloadError(f"{redact_url(url)}: not the hub's listing of files; is HF_ENDPOINT right?")
        if following is None:
            return entries, None
        address = urllib.parse.urljoin(url, following[1])
        if _origin(address) != _origin(self.endpoint):
            raise DownloadError(f"the listing continues at another host, {redact_url(address)}; refused")
        return entries, address

    def file_url(self, path: str) -> str:
        revision = urllib.parse.quote(self.revision, safe="")
        return f"{self.endpoint}/{self.repository}/resolve/{revision}/{urllib.parse.quote(path)}"

    @contextlib.contextmanager
    def open(self, url: str, offset: int = 0) -> Iterator[http.client.HTTPResponse]:
        """The response to a request for `url` from byte `offset` on.

        Raises:
            DownloadError: a permanent failure: no access, no such file.
            _TransientError: a failure that a retry may resolve.
        """
        request = urllib.request.Request(url)
        request.add_header("User-Agent", f"octavo/{__version__}")
        request.add_header("Accept-Encoding", "identity")
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with self._open(request, timeout=TIMEOUT) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                raise self._error_of(error) from None
        except urllib.error.URLError as error:
            raise _TransientError(f"{redact_url(url)} cannot be reached ({error.reason})") from None
        except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
            raise _TransientError(
                f"{redact_url(url)}: the connection broke ({type(error).__name__})"
            ) from None

    def _error_of(self, error: urllib.error.HTTPError) -> Exception:
        where, kind = redact_url(error.url), error.headers.get("X-Error-Code", "")
        # Not error.reason: it is the server's text, or an address with its signature.
        answer = f"{where} answers {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        if error.code == 416:
            return _RangeRefused()
        at_the_hub = _origin(error.url) == _origin(self.endpoint)
        stale_signature = error.code == 403 and not at_the_hub
        if error.code == 429 or error.code >= 500 or stale_signature:
            wait = error.headers.get("Retry-After", "")
            return _TransientError(answer, float(wait) if wait.isdecimal() else 0.0)
        if error.code in (401, 403) and kind != "RepoNotFound":
            reason = "the token was refused" if self._token else "no token was sent"
            return DownloadError(
                f"no access to {self.repository} ({error.code}; {reason}): accept the licence at "
                f"{self.web_page()} and set HF_TOKEN to a token of that account with read access",
                code=2,
            )
        if error.code in (401, 404):
            missing = {
                "RevisionNotFound": f"no revision {self.revision!r}",
                "EntryNotFound": f"no such file ({where})",
            }.get(kind, f"no such repository, or no revision {self.revision!r}")
            return DownloadError(
                f"{self.repository}: {missing} at {self.endpoint} ({error.code}); check the name, and set "
                "HF_TOKEN if it is private",
                code=2,
            )
        return DownloadError(answer)


class _RangeRefused(Exception):
    """The server refused a range request."""


def _remote_file(entry: Mapping[str, Any]) -> RemoteFile:
    large = entry.get("lfs")
    sha256 = large.get("oid") if isinstance(large, Mapping) else None
    path, size, oid = entry.get("path"), entry.get("size"), entry.get("oid")
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        raise DownloadError(
            f"the hub's listing has an entry without path or size: {ascii(dict(entry))[:200]}"
        )
    if isinstance(sha256, str):
        sha256 = sha256.removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise DownloadError(f"the hub's listing has no usable SHA-256 for {check_path(path)}")
        return RemoteFile(check_path(path), size, sha256, None)
    git_sha1 = oid.lower() if isinstance(oid, str) and re.fullmatch(r"[0-9a-fA-F]{40}", oid) else None
    return RemoteFile(check_path(path), size, None, git_sha1)


def _with_retries(attempt: Callable[[], T], progressed: Callable[[], bool] = lambda: False) -> T:
    """Call `attempt` until it succeeds, with growing waits; `progressed`: whether the last try got bytes."""
    tries = 0
    while True:
        try:
            return attempt()
        except _TransientError as error:
            tries = 0 if progressed() else tries
            if tries == len(RETRY_WAITS):
                raise DownloadError(
                    f"{error}, {tries + 1} times; check the network, HF_ENDPOINT and the proxy variables, "
                    "then rerun the same command to continue"
                ) from None
            wait = min(60.0, max(error.wait, RETRY_WAITS[tries]))
            print(f"{error}; retrying in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
            tries += 1


class DownloadProgress:
    """One line per file: updated in place on a terminal, else a new line every 30 seconds."""

    def __init__(self, file: RemoteFile, stream: IO[str]) -> None:
        self._file, self._stream = file, stream
        self._live = stream.isatty()
        self._every = 0.1 if self._live else 30.0  # seconds
        self._began = self._shown_at = time.monotonic()
        self._first = -1

    def show(self, done: int, *, end: bool = False) -> None:
        """Report `done` bytes of the file; `end`: it is complete."""
        now = time.monotonic()
        self._first = done if self._first < 0 else self._first
        if end or now - self._shown_at > self._every:
            self._shown_at = now
            speed = round((done - self._first) / max(now - self._began, 1e-3))
            share = 100 * done // self._file.size if self._file.size else 100
            so_far = f"{format_bytes(done)} of {format_bytes(self._file.size)}"
            line = f"{self._file.path}  {share:3d}%  {so_far}  {format_bytes(speed)}/s"
            start, stop = ("\r\033[K", "\n" if end else "") if self._live else ("", "\n")
            print(f"{start}{line}", end=stop, file=self._stream, flush=True)


def download_file(hub: Hub, file: RemoteFile, folder: Path, stream: IO[str]) -> bool:
    """Download `file` to `folder`; False if it is already there.

    Raises:
        DownloadError: it cannot be downloaded, or its content does not have the listed size and hash.
    """
    target = folder / PurePosixPath(file.path)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(f"{target.parent} is a link to outside of {folder}; refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and target.stat().st_size == file.size and _is_intact(target, file):
        print(f"{file.path}  already there", file=stream)
        return False
    part = target.with_name(f"{target.name}.{(file.expected_hash or 'unverified')[:12]}.part")
    if file.expected_hash is None:
        part.unlink(missing_ok=True)  # without a hash an old part may be of another file
    progress = DownloadProgress(file, stream)
    for last_try in (False, True):
        _download_part(hub, file, part, progress)
        if _is_intact(part, file):
            break
        part.unlink()
        if last_try:
            raise DownloadError(
                f"{file.path}: the content does not have the size and hash that the hub lists; try later"
            )
    progress.show(file.size, end=True)
    os.replace(part, target)
    return True


def _is_intact(path: Path, file: RemoteFile) -> bool:
    """Whether the file has the listed size and hash."""
    if path.stat().st_size != file.size:
        return False
    digest = file.new_hash()
    if digest is None:
        return True
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == file.expected_hash


def _download_part(hub: Hub, file: RemoteFile, part: Path, progress: DownloadProgress) -> None:
    """Download the rest of `file` into `part`, with retries."""
    url = hub.file_url(file.path)
    before = -1

    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    def progressed() -> bool:
        return size() > before

    def attempt() -> None:
        nonlocal before
        before = size()
        if before > file.size:
            part.unlink()
            before = 0
        try:
            with hub.open(url, before) as response:
                _append(response, file, part, before, progress)
        except _RangeRefused:
            part.unlink(missing_ok=True)
            raise _TransientError(f"{redact_url(url)}: the range from byte {before} was refused") from None
        if size() < file.size:
            raise _TransientError(
                f"{redact_url(url)}: the connection ended after {size():,} of {file.size:,} bytes"
            )

    if size() != file.size or file.size == 0:
        _with_retries(attempt, progressed)


def _append(
    response: http.client.HTTPResponse, file: RemoteFile, part: Path, offset: int, progress: DownloadProgress
) -> None:
    continued = response.status == 206
    if continued and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        raise _RangeRefused
    with part.open("ab" if continued else "wb") as stream:
        try:
            while chunk := response.read1(_CHUNK):
                if stream.tell() + len(chunk) > file.size:
                    raise DownloadError(
                        f"{file.path}: the server sends more than the {file.size:,} bytes that are listed"
                    )
                stream.write(chunk)
                progress.show(stream.tell())
        finally:
            stream.flush()
            os.fsync(stream.fileno())
