"""`manifest.json` and the checksums in it: which files make up a checkpoint, and whether they are intact.

The manifest is written last. It lists every file with its size and hashes, and where the checkpoint comes
from: step, number of processes, layout, a hash of the configuration, versions. It ends with a hash of itself,
and its bytes must be exactly those that serialising its values gives, so damage to the manifest is detected
too.

Files are hashed while they are written and verified before they are loaded, in blocks of 16 MiB, so that
several threads can verify one file and a difference is located.

    crc32    detects every error of up to 32 adjacent bits in a block, so each single flipped bit, and all
             but one in 2^32 of other errors. No protection against forgery, since an attacker can rewrite the
             manifest too. Faster than reading a disk
    sha256   detects any error; a few times slower than crc32
    none     sizes only

zlib and hashlib release the interpreter's lock over large blocks, so threads run in parallel.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint
from octavo.core.fs import open_to_read, read_whole

FILE = "manifest.json"
FORMAT = "octavo checkpoint 1"
BLOCK = 16 * 2**20
_READ = 2**20  # bytes per read: what is hashed should still be in the processor's cache
_THREADS = 4


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


ALGORITHMS: Mapping[str, Callable[[], _Hash] | None] = MappingProxyType(
    {"crc32": _Crc32, "sha256": hashlib.sha256, "none": None}
)


@dataclass(frozen=True)
class FileDigest:
    """A file's size in bytes, and the hash of each block (empty with the algorithm none)."""

    bytes: int
    blocks: tuple[str, ...]


class HashingFile(io.RawIOBase):
    """A new file that is hashed while it is written sequentially."""

    def __init__(self, path: Path, algorithm: str):
        super().__init__()
        self._file = path.open("xb")
        self._new_hash = ALGORITHMS[algorithm]
        self._hash = self._new_hash() if self._new_hash else None
        self._blocks: list[str] = []
        self._size = 0
        self.error: OSError | None = None
        """The error of a write, for callers that get another one from a library in between."""

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        if self._hash is not None:
            self._update(view)
        self._size += len(view)
        return len(view)

    def _update(self, view: memoryview) -> None:
        assert self._hash is not None
        assert self._new_hash is not None
        room = BLOCK - self._size % BLOCK
        while len(view) >= room:
            self._hash.update(view[:room])
            self._blocks.append(self._hash.hexdigest())
            self._hash, view, room = self._new_hash(), view[room:], BLOCK
        self._hash.update(view)

    def digest(self) -> FileDigest:
        """The digest of everything written so far."""
        rest = [self._hash.hexdigest()] if self._hash is not None and self._size % BLOCK else []
        return FileDigest(self._size, (*self._blocks, *rest))

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        self._file.flush()  # callers sync the descriptor
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            super().close()


def write_synced(path: Path, data: bytes, algorithm: str = "none") -> FileDigest:
    """Write `data` to a new file and sync it to disk."""
    with HashingFile(path, algorithm) as file:
        file.write(data)
        os.fsync(file.fileno())
        return file.digest()


def verify_files(
    folder: Path, files: Mapping[str, FileDigest], algorithm: str, *, threads: int = _THREADS
) -> list[str]:
    """The problems of `files` in `folder`, each as "name: problem", in order; empty if they are intact."""
    problems: dict[str, str] = {}
    blocks: list[tuple[str, int, str]] = []
    for name, digest in files.items():
        try:
            size = os.stat(folder / name).st_size
        except FileNotFoundError:
            problems[name] = "missing"
        except OSError as error:
            problems[name] = error.strerror or str(error)
        else:
            if size != digest.bytes:
                kind = "truncated" if size < digest.bytes else "too long"
                problems[name] = f"{kind}: {size:,} bytes, {digest.bytes:,} were written"
            else:
                blocks += [(name, number, block) for number, block in enumerate(digest.blocks)]
    new_hash = ALGORITHMS[algorithm]
    if new_hash is not None and blocks:
        with ThreadPoolExecutor(min(threads, len(blocks))) as pool:
            parts = [blocks[start::threads] for start in range(threads)]
            damaged = pool.map(lambda part: _find_damaged_blocks(folder, part, new_hash), parts)
            for name, problem in chain.from_iterable(damaged):
                problems.setdefault(name, problem)
    return [f"{name}: {problems[name]}" for name in files if name in problems]


def _find_damaged_blocks(
    folder: Path, blocks: Sequence[tuple[str, int, str]], new_hash: Callable[[], _Hash]
) -> list[tuple[str, str]]:
    """(file, problem) of each of the (file, block number, hash) in `blocks` that differs."""
    buffer, damaged = memoryview(bytearray(_READ)), []
    file, opened = None, ""
    try:
        for name, number, expected in blocks:
            try:
                if file is None or opened != name:
                    if file is not None:
                        file.close()
                    file, opened = open_to_read(folder / name).detach(), name
                found = _hash_block(file, number, new_hash(), buffer)
            except OSError as error:
                damaged.append((name, error.strerror or str(error)))
                continue
            if found != expected:
                damaged.append(
                    (name, f"hash differs, within {BLOCK >> 20} MiB from byte {number * BLOCK:,} on")
                )
    finally:
        if file is not None:
            file.close()
    return damaged


def _hash_block(file: io.RawIOBase, number: int, block_hash: _Hash, buffer: memoryview) -> str:
    file.seek(number * BLOCK)
    left = BLOCK
    while left and (length := file.readinto(buffer[: min(left, len(buffer))])):
        block_hash.update(buffer[:length])
        left -= length
    return block_hash.hexdigest()


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """A short hash of a configuration."""
    return _digest(config)[:16]


def render(step: int, algorithm: str, files: Mapping[str, FileDigest], about: Mapping[str, Any]) -> bytes:
    """The content of a checkpoint's `manifest.json`. `about`: further fields, for information."""
    return _serialize(
        {
            "format": FORMAT,
            "step": step,
            **about,
            "hash": algorithm,
            "block_bytes": BLOCK,
            "files": {
                name: {"bytes": files[name].bytes, "blocks": list(files[name].blocks)}
                for name in sorted(files)
            },
        }
    )


def _serialize(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps({**fields, "sha256_of_the_above": _digest(fields)}, indent=1) + "\n").encode()


def _check_name(name: str) -> str:
    """`name`; `ValueError` unless it is a file name without a folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(name)
    return name


def read(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`; "files" maps names to `FileDigest`.

    Raises `DamagedCheckpoint` if it is missing, damaged, in an unknown format, or of another step than
    `step`.
    """
    path = folder / FILE
    try:
        raw = read_whole(path)
        fields = json.loads(raw)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{FILE}: missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{FILE}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{FILE}: not JSON ({error})") from None
    if not isinstance(fields, dict) or "sha256_of_the_above" not in fields:
        raise DamagedCheckpoint(f"{FILE}: not a manifest of octavo")
    del fields["sha256_of_the_above"]
    try:
        intact = _serialize(fields) == raw
    except ValueError:  # half a surrogate pair
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"{FILE}: hash differs")
    if fields.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{FILE}: foreign: format {fields.get('format')!r}, not {FORMAT!r}")
    if step is not None and fields.get("step") != step:
        raise DamagedCheckpoint(f"{FILE}: foreign: it is of step {fields.get('step')}")
    if fields.get("hash") not in [*ALGORITHMS] or fields.get("block_bytes") != BLOCK:
        raise DamagedCheckpoint(f"{FILE}: foreign: unknown hash {fields.get('hash')!r}")
    try:
        fields["files"] = {
            _check_name(name): FileDigest(int(entry["bytes"]), tuple(map(str, entry["blocks"])))
            for name, entry in fields["files"].items()
        }
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        raise DamagedCheckpoint(f"{FILE}: foreign: its list of files is invalid") from None
    return fields
