"""Writes a prepared folder atomically: after a crash the same command resumes, and a partial folder is never
mistaken for a complete one.

Everything is written into FOLDER.partial, which is renamed to FOLDER when it is complete. In it a shard gets
its final name when it is complete and on disk, and after each shard `progress.json` is replaced by one that
lists the finished shards and the last record in them. A killed run resumes after that record and discards
what was written later. Shards are filled in the order of the records, so the result is the same bytes for any
number of workers and interruptions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from octavo.core.errors import ConfigError
from octavo.core.file_lock import open_lock, try_lock
from octavo.core.fs import sync, write_file
from octavo.data import shard_format
from octavo.data.shard_format import File, Index, Shard, Vocabulary, shard_from_json

_PROGRESS = "progress.json"
_TEMPORARY = ".tmp"


class _OpenFile:
    """A file that is being written and hashed."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._digest = path, 0, hashlib.sha256()
        temporary = path.with_name(path.name + _TEMPORARY)
        temporary.unlink(missing_ok=True)  # of an interrupted run, or a link
        self._file: BinaryIO = temporary.open("xb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def publish(self) -> File:
        """Sync the file and give it its final name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, self._path)
        return File(self._path.name, self._size, self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()


class _OpenShard:
    """A shard that is being filled."""

    def __init__(self, folder: Path, name: str) -> None:
        self.tokens = self.documents = self.text_bytes = 0
        self._ids = _OpenFile(folder / f"{name}.tokens")
        self._offsets = _OpenFile(folder / f"{name}.documents")
        self._offsets.write(np.zeros(1, dtype="<i8").tobytes())

    def append(self, ids: bytes, lengths: Sequence[int], text_bytes: int) -> None:
        ends = self.tokens + np.cumsum(lengths, dtype="<i8")
        self._ids.write(ids)
        self._offsets.write(ends.tobytes())
        self.tokens, self.documents = int(ends[-1]), self.documents + len(lengths)
        self.text_bytes += text_bytes

    def publish(self) -> Shard:
        files = self._ids.publish(), self._offsets.publish()
        return Shard(self.tokens, self.documents, *files, self.text_bytes)

    def close(self) -> None:
        self._ids.close()
        self._offsets.close()


class ShardWriter:
    """Writes the shards of `out`, from the start or from the progress of an interrupted run.

    Args:
        out: the folder to create; it must not exist.
        identity: settings that must be equal to resume an interrupted run; JSON-able.
        shard_tokens: tokens at which a shard of the training split is closed.

    Attributes:
        position: the last record in the finished shards, as passed to `record_progress`; None at the start.
        state: the caller's state at that record.

    Raises:
        ConfigError: `out` exists, another process is writing it, or an interrupted run had another identity.
    """

    def __init__(self, out: Path, *, identity: Mapping[str, Any], shard_tokens: int) -> None:
        self._out, self._folder = out, out.with_name(out.name + ".partial")
        self._identity, self._shard_tokens = json.loads(json.dumps(identity)), shard_tokens
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigError(f"{out}: already exists; name a new folder, or remove it first")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = open_lock(self._folder / ".lock")
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be written ({error.strerror})") from error
        if not try_lock(self._lock):
            self._lock.close()
            raise ConfigError(f"{self._folder}: another process is preparing it; wait for it to end")
        self._open: dict[str, _OpenShard] = {}
        self._done: dict[str, list[Shard]] = {}
        self.position: Any = None
        self.state: Any = None
        self._number = 0
        try:
            self._resume()
        except BaseException:
            self._lock.close()
            raise

    def _resume(self) -> None:
        path = self._folder / _PROGRESS
        if path.exists():
            progress = json.loads(path.read_bytes())
            if progress["identity"] != self._identity:
                before = progress["identity"]
                changed = ", ".join(key for key in self._identity if before.get(key) != self._identity[key])
                raise ConfigError(
                    f"{self._folder}: left by an interrupted run with another {changed or 'identity'}; use "
                    "the same settings to resume it, or remove it"
                )
            self._done = {
                split: [shard_from_json(fields) for fields in shards]
                for split, shards in progress["done"].items()
            }
            self.position, self.state = progress["position"], progress["state"]
            self._number = progress["number"]
        known = {file.name for shards in self._done.values() for shard in shards for file in shard.files}
        for leftover in self._folder.iterdir():
            if leftover.name not in {*known, _PROGRESS, ".lock"}:
                leftover.unlink()

    def tokens(self, split: str) -> int:
        """Tokens written to a split so far."""
        finished = sum(shard.tokens for shard in self._done.get(split, ()))
        return finished + (self._open[split].tokens if split in self._open else 0)

    def append(self, split: str, ids: bytes, lengths: Sequence[int], text_bytes: int) -> None:
        """Add documents to a split: their concatenated ids in the corpus's dtype, their lengths in ids, and
        the bytes of their text.
        """
        if not lengths:
            return
        if split not in self._open:
            self._open[split] = _OpenShard(self._folder, f"{split}-{self._number:05d}")
        self._open[split].append(ids, lengths, text_bytes)

    def record_progress(self, position: Any, state: Any) -> None:
        """All records up to `position` have been appended: publish the shards if they are full."""
        shard = self._open.get(shard_format.TRAIN)
        if shard is not None and shard.tokens >= self._shard_tokens:
            self._publish(position, state)

    def _publish(self, position: Any, state: Any) -> None:
        for split, shard in self._open.items():
            self._done.setdefault(split, []).append(shard.publish())
        self._open = {}
        self._number += 1
        self.position, self.state = position, state
        done = {split: [asdict(shard) for shard in found] for split, found in self._done.items()}
        progress = {
            "identity": self._identity,
            "done": done,
            "position": position,
            "state": state,
            "number": self._number,
        }
        self._replace(_PROGRESS, json.dumps(progress))

    def finish(
        self,
        position: Any,
        state: Any,
        *,
        dtype: str,
        vocabulary: Vocabulary,
        sources: Sequence[Mapping[str, Any]],
        versions: Mapping[str, str],
        bad_records: int,
    ) -> Index:
        """Publish the shards, write the index, and give the folder its final name."""
        self._publish(position, state)
        index = Index(
            dtype=dtype,
            vocabulary=vocabulary,
            splits={split: tuple(self._done[split]) for split in sorted(self._done)},
            sources=tuple(sources),
            versions=versions,
            bad_records=bad_records,
        )
        self._replace(shard_format.INDEX, shard_format.to_json(index))
        (self._folder / _PROGRESS).unlink()
        (self._folder / ".lock").unlink()
        sync(self._folder)
        os.rename(self._folder, self._out)
        sync(self._out.parent)
        self._lock.close()
        return index

    def close(self) -> None:
        """Close the open files. Finished shards stay, so that the run can be resumed."""
        for shard in self._open.values():
            shard.close()
        self._open = {}
        self._lock.close()

    def discard(self) -> None:
        """Remove everything that was written."""
        self.close()
        shutil.rmtree(self._folder)

    def _replace(self, name: str, text: str) -> None:
        write_file(self._folder / name, text, durable=True)
