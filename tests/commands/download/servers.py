"""Two servers on this machine: a hub, and the store that it redirects to; and what they have."""

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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


class Store(_Handler):
    name = "store"

    def answer(self, path: str, failure: Any) -> None:
        self.content(self.world.files[path.removeprefix("/blob/")], failure)


class HubServer(_Handler):
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


def folder_content(parent: str = "assets/hf") -> dict[str, bytes]:
    root = Path(parent) / NAME
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }
