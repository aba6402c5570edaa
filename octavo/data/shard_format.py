"""The format of a prepared corpus, which `octavo prepare` writes and training reads.

    FOLDER/index.json                 lists the files below with sizes and checksums
    FOLDER/train-00000.tokens         concatenated ids of the documents, little-endian uint16 or uint32
    FOLDER/train-00000.documents      offset of each document in it, and the end; little-endian int64
    FOLDER/validation-00000.tokens    …

The begin and end ids of documents are stored too, so a shard is memory-mapped and sliced as it is. Ids take
two bytes in vocabularies of up to 65,536. A document is never split between shards; a sample may be.

A corpus and a run must have the same vocabulary. Its hash (`Tokenizer.fingerprint`) is of pairs of token and
id and not of a file, because the same vocabulary is stored in several formats.

This module imports only the standard library, because the checks before a run use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.core.errors import ConfigError
from octavo.core.fs import open_to_read, read_json

INDEX = "index.json"
FORMAT = "octavo-tokens-1"
OFFSET_BYTES = 8
_WIDTHS = {"uint16": 2, "uint32": 4}

Split = Literal["train", "validation"]
TRAIN: Split = "train"
VALIDATION: Split = "validation"


@dataclass(frozen=True)
class File:
    """A file of the folder: name, size in bytes, SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A shard: number of tokens and documents, its two files, and the bytes of its text in UTF-8 (None in
    folders that were prepared before they were counted).
    """

    tokens: int
    documents: int
    ids: File
    offsets: File
    text_bytes: int | None = None

    @property
    def files(self) -> tuple[File, File]:
        return self.ids, self.offsets


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's vocabulary. sha256: `Tokenizer.fingerprint`; source: its path, for messages."""

    size: int
    sha256: str
    bos_id: int | None
    eos_id: int
    source: str


@dataclass(frozen=True)
class Index:
    """`index.json`. splits: name -> shards, in order. The fields after it are for information only."""

    dtype: str
    vocabulary: Vocabulary
    splits: Mapping[str, tuple[Shard, ...]]
    sources: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] | None = None
    bad_records: int = 0

    @property
    def shards(self) -> list[Shard]:
        return [shard for split in self.splits.values() for shard in split]

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits.get(split, ()))

    def bytes_per_token(self, split: str) -> float | None:
        """Bytes of text per token, on average; None if they are not known."""
        counts = [shard.text_bytes for shard in self.splits.get(split, ())]
        known = [count for count in counts if count is not None]
        return sum(known) / max(1, self.tokens(split)) if len(known) == len(counts) else None

    def digest(self, split: str) -> int:
        """A hash of the split's tokens."""
        text = ",".join(shard.ids.sha256 for shard in self.splits.get(split, ()))
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def narrowest_dtype(vocab_size: int) -> str:
    """The narrowest dtype for every id of the vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_prepared(path: Path) -> bool:
    """Whether `path` is a folder with an index, which `octavo prepare` writes last."""
    return (path / INDEX).is_file()


def to_json(index: Index) -> str:
    """The content of `index.json`."""
    return json.dumps({"format": FORMAT, **asdict(index)}, indent=1) + "\n"


def shard_from_json(fields: Mapping[str, Any]) -> Shard:
    """The inverse of `dataclasses.asdict`."""
    ids, offsets = File(**fields["ids"]), File(**fields["offsets"])
    return Shard(fields["tokens"], fields["documents"], ids, offsets, fields.get("text_bytes"))


def read_index(folder: Path) -> Index:
    """The index of a prepared folder.

    Raises:
        ConfigError: it is missing, has another format, or is inconsistent.
    """
    path, remedy = folder / INDEX, "prepare the data again"
    try:
        content = read_json(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: damaged, not JSON ({error}); {remedy}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path}: its format is {found!r}, but octavo reads {FORMAT!r}; {remedy}")
    try:
        index = Index(
            dtype=content["dtype"],
            vocabulary=Vocabulary(**content["vocabulary"]),
            splits={
                str(name): tuple(map(shard_from_json, shards)) for name, shards in content["splits"].items()
            },
            sources=tuple(content["sources"]),
            versions=content["versions"],
            bad_records=content["bad_records"],
        )
        problem = _find_inconsistency(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: damaged ({type(error).__name__}: {error}); {remedy}") from error
    if problem:
        raise ConfigError(f"{path}: damaged ({problem}); {remedy}")
    return index


def _find_inconsistency(index: Index) -> str:
    if index.dtype not in _WIDTHS:
        return f"dtype {index.dtype!r}"
    if not 0 < index.vocabulary.size <= 1 << 8 * _WIDTHS[index.dtype]:
        return f"a vocabulary of {index.vocabulary.size} in {index.dtype}"
    if TRAIN not in index.splits:
        return "no split for training"
    for shard in index.shards:
        text_bytes = 0 if shard.text_bytes is None else shard.text_bytes
        counts = shard.tokens, shard.documents, shard.ids.bytes, shard.offsets.bytes, text_bytes
        if not all(type(number) is int and 0 <= number < 2**62 for number in counts):
            return f"a shard with the sizes {counts}"
        if shard.ids.bytes != shard.tokens * _WIDTHS[index.dtype]:
            return f"{shard.ids.name}: {shard.tokens} tokens in {shard.ids.bytes} bytes of {index.dtype}"
        if shard.offsets.bytes != (shard.documents + 1) * OFFSET_BYTES:
            return f"{shard.offsets.name}: {shard.documents} documents in {shard.offsets.bytes} bytes"
        for file in shard.files:
            if Path(file.name).name != file.name:
                return f"a file name with a folder in it, {file.name!r}"
    return ""


def check_sizes(folder: Path, index: Index) -> None:
    """Raise `ConfigError` for the first file that is missing or whose size differs from the index's."""
    for shard in index.shards:
        for file in shard.files:
            path = folder / file.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ConfigError(
                    f"{path}: {error.strerror or error}, but the index lists it; copy the folder again, or "
                    "prepare the data again"
                ) from error
            if size != file.bytes:
                raise ConfigError(
                    f"{path}: {size:,} bytes, but {file.bytes:,} in the index: it is truncated or of another "
                    "corpus; copy it again, or prepare the data again"
                )


def check_checksums(folder: Path, shards: Iterable[Shard]) -> None:
    """Raise `ConfigError` for the first file of `shards` whose SHA-256 differs from the index's."""
    for shard in shards:
        for file in shard.files:
            path = folder / file.name
            try:
                with open_to_read(path) as opened:
                    found = hashlib.file_digest(opened, "sha256").hexdigest()
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
            if found != file.sha256:
                raise ConfigError(
                    f"{path}: its SHA-256 is {found}, but {file.sha256} in the index: its content has "
                    "changed; copy it again, or prepare the data again"
                )
