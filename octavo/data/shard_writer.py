"""Writing a prepared folder so that a crash at any instant leaves either nothing to see, or a start to go on
from.

Everything is written into FOLDER.partial, which becomes FOLDER by one rename when it is whole. Within it a
shard gets its name when it is complete and on disk, and after each shard `progress.json` is replaced by one
that lists the finished shards and the last record that is in them. So a run that was killed goes on behind
that record; what it wrote after it is thrown away. Because shards are filled in the order of the records,
whoever tokenised them, the result is the same bytes for any number of workers and interruptions.
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
from octavo.data import shard_format
from octavo.data.shard_format import File, Index, Shard, Vocabulary

_PROGRESS = "progress.json"
_TEMPORARY = ".tmp"


class _OpenFile:
    """A file that is being written, and the digest of what is in it."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._digest = path, 0, hashlib.sha256()
        self._file: BinaryIO = path.with_name(path.name + _TEMPORARY).open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def publish(self) -> File:
        """On disk, and under its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, self._path)
        return File(self._path.name, self._size, self._digest.hexdigest())

    def abandon(self) -> None:
        self._file.close()


class _OpenShard:
    """A shard that is being filled."""

    def __init__(self, folder: Path, name: str) -> None:
        self.tokens = self.documents = 0
        self._ids = _OpenFile(folder / f"{name}.tokens")
        self._offsets = _OpenFile(folder / f"{name}.documents")
        self._offsets.write(np.zeros(1, dtype="<i8").tobytes())

    def append(self, ids: bytes, lengths: Sequence[int]) -> None:
        ends = self.tokens + np.cumsum(lengths, dtype="<i8")
        self._ids.write(ids)
        self._offsets.write(ends.tobytes())
        self.tokens, self.documents = int(ends[-1]), self.documents + len(lengths)

    def publish(self) -> Shard:
        return Shard(self.tokens, self.documents, self._ids.publish(), self._offsets.publish())

    def abandon(self) -> None:
        self._ids.abandon()
        self._offsets.abandon()


class ShardWriter:
    """Fills the shards of `out`, from the start or from where an interrupted run stood.

    Args:
        out: the folder that there will be; it must not exist.
        identity: what must be the same for an interrupted run to be gone on with; JSON-able.
        shard_tokens: a shard of the training split is closed when it has this many.

    Attributes:
        position: what the last `mark` was given before the finished shards ended; None at the start.
        state: as `position`, what else the caller keeps.

    Raises:
        ConfigError: `out` exists, another run writes it, or what is left of one has another identity.
    """

    def __init__(self, out: Path, *, identity: Mapping[str, Any], shard_tokens: int) -> None:
        self._out, self._folder = out, out.with_name(out.name + ".partial")
        self._identity, self._shard_tokens = json.loads(json.dumps(identity)), shard_tokens
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigError(f"{out}: exists already; name a new folder, or remove it first")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = open_lock(self._folder / ".lock")
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot write there ({error.strerror})") from error
        if not try_lock(self._lock):
            self._lock.close()
            raise ConfigError(f"{self._folder}: another process is preparing it; wait for that")
        self._open: dict[str, _OpenShard] = {}
        self._done: dict[str, list[Shard]] = {}
        self.position: Any = None
        self.state: Any = None
        self._number = 0
        try:
            self._continue()
        except BaseException:
            self._lock.close()
            raise

    def _continue(self) -> None:
        path = self._folder / _PROGRESS
        if path.exists():
            progress = json.loads(path.read_bytes())
            if progress["identity"] != self._identity:
                theirs = progress["identity"]
                other = ", ".join(key for key in self._identity if theirs.get(key) != self._identity[key])
                raise ConfigError(
                    f"{self._folder}: left by an interrupted run with other {other or 'settings'}; give "
                    "the same again to go on with it, or remove it"
                )
            self._done = {split: [_shard(one) for one in found] for split, found in progress["done"].items()}
            self.position, self.state = progress["position"], progress["state"]
            self._number = progress["number"]
        known = {file.name for found in self._done.values() for shard in found for file in shard.files}
        for leftover in self._folder.iterdir():
            if leftover.name not in {*known, _PROGRESS, ".lock"}:
                leftover.unlink()

    def tokens(self, split: str) -> int:
        """Tokens of a split so far."""
        open_shard = self._open.get(split)
        return sum(shard.tokens for shard in self._done.get(split, ())) + (
            open_shard.tokens if open_shard else 0
        )

    def append(self, split: str, ids: bytes, lengths: Sequence[int]) -> None:
        """Add documents to a split: their ids one after the other, in the corpus's type; their lengths."""
        if not lengths:
            return
        if split not in self._open:
            self._open[split] = _OpenShard(self._folder, f"{split}-{self._number:05d}")
        self._open[split].append(ids, lengths)

    def mark(self, position: Any, state: Any) -> None:
        """All records up to `position` have been appended; close the shards if they are full."""
        full = self._open.get(shard_format.TRAIN)
        if full is not None and full.tokens >= self._shard_tokens:
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
        """Close the shards, write the index, and give the folder its name."""
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
        _sync_folder(self._folder)
        os.rename(self._folder, self._out)
        _sync_folder(self._out.parent)
        self._lock.close()
        return index

    def abandon(self) -> None:
        """Close what is open; the finished shards stay, to go on from."""
        for shard in self._open.values():
            shard.abandon()
        self._open = {}
        self._lock.close()

    def discard(self) -> None:
        """Remove what was written."""
        self.abandon()
        shutil.rmtree(self._folder)

    def _replace(self, name: str, text: str) -> None:
        temporary = self._folder / (name + _TEMPORARY)
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / name)
        _sync_folder(self._folder)


def _shard(content: Mapping[str, Any]) -> Shard:
    return Shard(content["tokens"], content["documents"], File(**content["ids"]), File(**content["offsets"]))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
