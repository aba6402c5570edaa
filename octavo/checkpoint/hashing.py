"""Checksums of a checkpoint's files: taken while they are written, compared before they are loaded.

A file is hashed in blocks of 16 MiB, so that several threads can check one file and a difference is located.

    crc32    finds every error of up to 32 neighbouring bits in a block, so each single flipped bit, and other
             damage but for one case in 2^32; no protection against someone who forges a checkpoint, for who
             can write the files can write the manifest too. Faster than reading a disk
    sha256   finds all that ever happens; a few times slower than crc32
    none     sizes only

zlib and hashlib release the interpreter's lock over large blocks, so threads do run side by side.
"""

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

BLOCK = 16 * 2**20
_READ = 2**20  # at a time: what is hashed should still be in the processor's cache
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
class Content:
    """What a file holds: bytes, and the hash of each block (none with the algorithm none)."""

    bytes: int
    blocks: tuple[str, ...]


class HashingFile(io.RawIOBase):
    """A new file that is hashed as it is written, from start to end."""

    def __init__(self, path: Path, algorithm: str):
        super().__init__()
        self._file = path.open("xb")
        self._new_hash = ALGORITHMS[algorithm]
        self._hash = self._new_hash() if self._new_hash else None
        self._blocks: list[str] = []
        self._size = 0
        self.error: OSError | None = None
        """What went wrong in a write, for those who write through something that hides it."""

    def write(self, data: Any, /) -> int:
        """Append bytes."""
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

    def content(self) -> Content:
        """What has been written so far."""
        rest = [self._hash.hexdigest()] if self._hash is not None and self._size % BLOCK else []
        return Content(self._size, (*self._blocks, *rest))

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def fileno(self) -> int:
        """The descriptor; what was written is flushed to it, since who asks is about to sync it."""
        self._file.flush()
        return self._file.fileno()

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        try:
            self._file.close()
        finally:
            super().close()


def write_synced(path: Path, data: bytes, algorithm: str = "none") -> Content:
    """A new file with `data`, on disk when this returns."""
    with HashingFile(path, algorithm) as file:
        file.write(data)
        os.fsync(file.fileno())
        return file.content()


def differences(
    folder: Path, files: Mapping[str, Content], algorithm: str, *, threads: int = _THREADS
) -> list[str]:
    """What is wrong with `files` of `folder`: one "name: problem" each, in order, empty if all is well."""
    problems: dict[str, str] = {}
    blocks: list[tuple[str, int, str]] = []
    for name, content in files.items():
        try:
            size = os.stat(folder / name).st_size
        except FileNotFoundError:
            problems[name] = "missing"
        except OSError as error:
            problems[name] = error.strerror or str(error)
        else:
            if size != content.bytes:
                what = "truncated" if size < content.bytes else "too long"
                problems[name] = f"{what}: {size:,} bytes, {content.bytes:,} were written"
            else:
                blocks += [(name, number, digest) for number, digest in enumerate(content.blocks)]
    new_hash = ALGORITHMS[algorithm]
    if new_hash is not None and blocks:
        with ThreadPoolExecutor(min(threads, len(blocks))) as pool:
            parts = [blocks[start::threads] for start in range(threads)]
            for name, problem in _chained(pool.map(lambda part: _compare(folder, part, new_hash), parts)):
                problems.setdefault(name, problem)
    return [f"{name}: {problems[name]}" for name in files if name in problems]


def _chained(found: Iterable[list[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    for part in found:
        yield from part


def _compare(
    folder: Path, blocks: Sequence[tuple[str, int, str]], new_hash: Callable[[], _Hash]
) -> list[tuple[str, str]]:
    """The blocks that differ, by one buffer for all of them."""
    buffer, found = memoryview(bytearray(_READ)), []
    file, opened = None, ""
    try:
        for name, number, expected in blocks:
            try:
                if file is None or opened != name:
                    if file is not None:
                        file.close()
                    file, opened = (folder / name).open("rb", buffering=0), name
                found_hash = _block_hash(file, number, new_hash(), buffer)
            except OSError as error:
                found.append((name, error.strerror or str(error)))
                continue
            if found_hash != expected:
                found.append(
                    (name, f"hash differs, within {BLOCK >> 20} MiB from byte {number * BLOCK:,} on")
                )
    finally:
        if file is not None:
            file.close()
    return found


def _block_hash(file: io.FileIO, number: int, block_hash: _Hash, buffer: memoryview) -> str:
    file.seek(number * BLOCK)
    left = BLOCK
    while left and (length := file.readinto(buffer[: min(left, len(buffer))])):
        block_hash.update(buffer[:length])
        left -= length
    return block_hash.hexdigest()
