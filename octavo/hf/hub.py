"""The Hugging Face hub over its two addresses, with the standard library alone.

`{endpoint}/api/models/{repo}/tree/{revision}` lists names, sizes and hashes;
`{endpoint}/{repo}/resolve/{revision}/{path}` gives a file or redirects to the store that has it. What can
go wrong decides the shape:

- The token opens the user's account. It goes to the endpoint's own host alone, not along a redirect and not
over
  plain http.
- Connections break. A file grows as `NAME.HASH.part` and is continued by a range request, in this run or a
later
  one; it gets its name when its size and hash are right, and by an atomic rename.
- The listing is a stranger's word. A path that leaves the folder, or that a terminal would obey, stops the
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
RETRY_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try; a try that got bytes starts the count anew
_CHUNK = 1 << 20
_LISTING_LIMIT = 64 << 20


class DownloadError(Exception):
    """One message for the user, and the exit code it ends with."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class _TryAgain(Exception):
    """A failure that may pass; carries what to say if it does not, and how long the server asks us to "
    "wait."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        path: relative to the repository, checked by `safe_path`.
        size: bytes.
        sha256: of the content, where the hub keeps the file in its large-file store; else None.
        git_sha1: of the content as a git blob, where it is kept in git; else None.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None

    def digest(self) -> hashlib._Hash | None:
        """A hash object ready for the content, or None where the hub told no hash."""
        if self.sha256 is not None:
            return hashlib.sha256()
        if self.git_sha1 is not None:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return None

    @property
    def expected(self) -> str | None:
        """What `digest` must come to."""
        return self.sha256 or self.git_sha1


def safe_path(path: str) -> str:
    """`path` if it is a plain relative path whose characters print; else an error.

    A listing comes from the network, and its names become files: `../../.bashrc` must not.
    """
    parts = path.split("/")
    plain = path.isprintable() and not any(letter in path for letter in '\\:*?"<>|')
    if not plain or any(part in ("", ".", "..") or part.startswith("~") for part in parts):
        raise DownloadError(
            f"the hub lists a file named {path!a}, which is no plain path inside a folder; refused"
        )
    return path


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token stays with the host it was meant for."""

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
            raise DownloadError(f"{shown(req.full_url)} redirects from https to an open address; refused")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        authorization = req.unredirected_hdrs.get("Authorization")
        if following is not None and authorization is not None and _origin(newurl) == _origin(req.full_url):
            following.add_unredirected_header("Authorization", authorization)
        return following


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def shown(url: str) -> str:
    """An address without its query and user: stores sign addresses there."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Hub:
    """One repository at one revision.

    Args:
        endpoint: scheme and host, with a path where the hub is mounted below one.
        token: or None.
    """

    def __init__(self, endpoint: str, repository: str, revision: str, token: str | None) -> None:
        self.endpoint, self.repository, self.revision = endpoint.rstrip("/"), repository, revision
        self._token = token
        self._open = urllib.request.build_opener(_Redirects()).open

    def page(self) -> str:
        """Where a person reads about the repository and accepts its licence."""
        return f"{self.endpoint}/{self.repository}"

    def files(self) -> list[RemoteFile]:
        """All files, in order of path."""
        revision = urllib.parse.quote(self.revision, safe="")
        url: str | None = f"{self.endpoint}/api/models/{self.repository}/tree/{revision}?recursive=true"
        found: list[RemoteFile] = []
        while url is not None:
            entries, url = _with_retries(partial(self._page_of_listing, url))
            found += [_remote_file(entry) for entry in entries if entry.get("type") == "file"]
        return sorted(found, key=lambda file: file.path)

    def _page_of_listing(self, url: str) -> tuple[list[dict[str, Any]], str | None]:
        with self.open(url) as response:
            content = response.read(_LISTING_LIMIT)
            following = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link", ""))
        try:
            entries = json.loads(content)
        except ValueError:
            entries = None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DownloadError(f"{shown(url)}: not the hub's listing of files; is HF_ENDPOINT right?")
        if following is None:
            return entries, None
        address = urllib.parse.urljoin(url, following[1])
        if _origin(address) != _origin(self.endpoint):
            raise DownloadError(f"the listing goes on at another host, {shown(address)}; refused")
        return entries, address

    def file_url(self, path: str) -> str:
        """Where the content of `path` is."""
        revision = urllib.parse.quote(self.revision, safe="")
        return f"{self.endpoint}/{self.repository}/resolve/{revision}/{urllib.parse.quote(path)}"

    @contextlib.contextmanager
    def open(self, url: str, offset: int = 0) -> Iterator[http.client.HTTPResponse]:
        """The response to a request for `url` from byte `offset` on.

        Raises:
            DownloadError: an answer that stays as it is: no right, no such thing.
            _TryAgain: an answer, or none, that may be another in a moment.
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
                raise self._refusal(error) from None
        except urllib.error.URLError as error:
            raise _TryAgain(f"{shown(url)} cannot be reached ({error.reason})") from None
        except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
            raise _TryAgain(f"{shown(url)}: the connection broke ({type(error).__name__})") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        where, kind = shown(error.url), error.headers.get("X-Error-Code", "")
        # not error.reason: that is the server's text, or an address with its signature
        answer = f"{where} answers {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        if error.code == 416:
            return _RangeRefused()
        at_the_hub = _origin(error.url) == _origin(self.endpoint)
        if (
            error.code == 429 or error.code >= 500 or (error.code == 403 and not at_the_hub)
        ):  # a stale signature
            wait = error.headers.get("Retry-After", "")
            return _TryAgain(answer, float(wait) if wait.isdecimal() else 0.0)
        if error.code in (401, 403) and kind != "RepoNotFound":
            asked = "the token was refused" if self._token else "no token was sent"
            return DownloadError(
                f"{self.repository} is closed to you ({error.code}; {asked}): accept the licence at "
                f"{self.page()} and set HF_TOKEN to a token of that account with read access",
                code=2,
            )
        if error.code in (401, 404):
            what = {
                "RevisionNotFound": f"no revision {self.revision!r}",
                "EntryNotFound": f"no such file ({where})",
            }
            missing = what.get(kind, f"no such repository, or no revision {self.revision!r}")
            return DownloadError(
                f"{self.repository}: {missing} at {self.endpoint} ({error.code}); check the name, and set "
                "HF_TOKEN if it is private",
                code=2,
            )
        return DownloadError(answer)


class _RangeRefused(Exception):
    """The server does not know the rest that was asked for."""


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
            raise DownloadError(f"the hub's listing has no usable SHA-256 for {safe_path(path)}")
        return RemoteFile(safe_path(path), size, sha256, None)
    git_sha1 = oid.lower() if isinstance(oid, str) and re.fullmatch(r"[0-9a-fA-F]{40}", oid) else None
    return RemoteFile(safe_path(path), size, None, git_sha1)


def _with_retries(attempt: Callable[[], T], progressed: Callable[[], bool] = lambda: False) -> T:
    """`attempt()` until it succeeds, with growing waits; `progressed`: whether the last try got something."""
    tries = 0
    while True:
        try:
            return attempt()
        except _TryAgain as error:
            tries = 0 if progressed() else tries
            if tries == len(RETRY_WAITS):
                raise DownloadError(
                    f"{error}, {tries + 1} times; check the network, HF_ENDPOINT and the proxy variables, "
                    "and run the same command again: it goes on where it stopped"
                ) from None
            wait = min(60.0, max(error.wait, RETRY_WAITS[tries]))
            print(f"{error}; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
            tries += 1


class DownloadProgress:
    """One line a file: rewritten in place on a terminal, a plain line now and then elsewhere."""

    def __init__(self, file: RemoteFile, stream: IO[str]) -> None:
        self._file, self._stream = file, stream
        self._live = stream.isatty()
        self._every = 0.1 if self._live else 30.0  # seconds
        self._began = self._shown_at = time.monotonic()
        self._first = -1

    def show(self, done: int, *, end: bool = False) -> None:
        """`done` bytes of the file are there; `end`: the last word."""
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


def fetch(hub: Hub, file: RemoteFile, folder: Path, stream: IO[str]) -> bool:
    """Bring `file` to `folder` unless it is there; False if it was.

    Raises:
        DownloadError: it cannot be had, or its content is not what the listing promised.
    """
    target = folder / PurePosixPath(file.path)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(f"{target.parent} is a link that leads out of {folder}; refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and target.stat().st_size == file.size and _matches(target, file):
        print(f"{file.path}  already there", file=stream)
        return False
    part = target.with_name(f"{target.name}.{(file.expected or 'unverified')[:12]}.part")
    if file.expected is None:
        part.unlink(missing_ok=True)  # nothing would tell an old beginning from a new one
    progress = DownloadProgress(file, stream)
    for last_try in (False, True):
        _fill(hub, file, part, progress)
        if _matches(part, file):
            break
        part.unlink()
        if last_try:
            raise DownloadError(
                f"{file.path}: the content does not have the size and hash that the hub lists; try later"
            )
    progress.show(file.size, end=True)
    os.replace(part, target)
    return True


def _matches(path: Path, file: RemoteFile) -> bool:
    """Whether the file has the promised content."""
    if path.stat().st_size != file.size:
        return False
    digest = file.digest()
    if digest is None:
        return True
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == file.expected


def _fill(hub: Hub, file: RemoteFile, part: Path, progress: DownloadProgress) -> None:
    """Let `part` grow to the file's size, however many connections that takes."""
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
            raise _TryAgain(f"{shown(url)}: the rest from byte {before} was refused") from None
        if size() < file.size:
            raise _TryAgain(f"{shown(url)}: the connection ended after {size():,} of {file.size:,} bytes")

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
