"""The format of a prepared corpus: what `octavo prepare` writes and a run trains on.

    FOLDER/index.json                 everything below, with sizes and checksums
    FOLDER/train-00000.tokens         ids, uint16 or uint32, little-endian, one document after the other
    FOLDER/train-00000.documents      where each document begins in it, and the last one ends; int64, likewise
    FOLDER/validation-00000.tokens    …

Ids are stored as the model reads them, between the ids that open and close a document, so that a shard needs
no interpretation: it is mapped into memory and sliced. The width follows the vocabulary: two bytes up to
65,536 ids. A document never crosses from one shard to the next; a sample may.

What the ids mean is the vocabulary, so that is what a corpus and a run must agree in. Its hash is over pairs
of token and id (`Tokenizer.fingerprint`), not over a file, for one vocabulary comes in several formats.

Only the standard library is used here: the check before a run reads it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.core.errors import ConfigError

INDEX = "index.json"
FORMAT = "octavo-tokens-1"
OFFSET_BYTES = 8
_WIDTHS = {"uint16": 2, "uint32": 4}
_PIECE = 1 << 24

Split = Literal["train", "validation"]
TRAIN: Split = "train"
VALIDATION: Split = "validation"


@dataclass(frozen=True)
class File:
    """One file: its name in the folder, its size in bytes and the SHA-256 of its bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """Tokens and documents of one shard, and its two files."""

    tokens: int
    documents: int
    ids: File
    offsets: File

    @property
    def files(self) -> tuple[File, File]:
        return self.ids, self.offsets


@dataclass(frozen=True)
class Vocabulary:
    """Whose ids these are. sha256: `Tokenizer.fingerprint`; source: where it was read from, for messages."""

    size: int
    sha256: str
    bos_id: int | None
    eos_id: int
    source: str


@dataclass(frozen=True)
class Index:
    """`index.json`. splits: name -> its shards in order. sources, versions, skipped: told, never read."""

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

    def digest(self, split: str) -> int:
        """A number that is another for other tokens."""
        text = ",".join(shard.ids.sha256 for shard in self.splits.get(split, ()))
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def dtype_for(vocab_size: int) -> str:
    """The narrowest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_prepared(path: Path) -> bool:
    """Whether `path` is a folder that `octavo prepare` has finished, or claims to be one."""
    return (path / INDEX).is_file()


def to_json(index: Index) -> str:
    """What `index.json` holds."""
    return json.dumps({"format": FORMAT, **asdict(index)}, indent=1) + "\n"


def read_index(folder: Path) -> Index:
    """The index of a prepared folder.

    Raises:
        ConfigError: there is none, it is no such index, or it contradicts itself.
    """
    path, remedy = folder / INDEX, "prepare the data again"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: damaged, not JSON ({error}); {remedy}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path}: its format is {found!r}, this octavo reads {FORMAT!r}; {remedy}")
    try:
        index = _from_json(content)
        problem = _contradiction(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: damaged ({type(error).__name__}: {error}); {remedy}") from error
    if problem:
        raise ConfigError(f"{path}: damaged ({problem}); {remedy}")
    return index


def _from_json(content: Mapping[str, Any]) -> Index:
    splits = {
        str(name): tuple(
            Shard(
                tokens=shard["tokens"],
                documents=shard["documents"],
                ids=File(**shard["ids"]),
                offsets=File(**shard["offsets"]),
            )
            for shard in shards
        )
        for name, shards in content["splits"].items()
    }
    return Index(
        dtype=content["dtype"],
        vocabulary=Vocabulary(**content["vocabulary"]),
        splits=splits,
        sources=tuple(content["sources"]),
        versions=content["versions"],
        bad_records=content["bad_records"],
    )


def _contradiction(index: Index) -> str:
    if index.dtype not in _WIDTHS:
        return f"dtype {index.dtype!r}"
    if not 0 < index.vocabulary.size <= 1 << 8 * _WIDTHS[index.dtype]:
        return f"a vocabulary of {index.vocabulary.size} in {index.dtype}"
    if TRAIN not in index.splits:
        return "no split for training"
    for shard in index.shards:
        if shard.ids.bytes != shard.tokens * _WIDTHS[index.dtype]:
            return f"{shard.ids.name}: {shard.tokens} tokens in {shard.ids.bytes} bytes of {index.dtype}"
        if shard.offsets.bytes != (shard.documents + 1) * OFFSET_BYTES:
            return f"{shard.offsets.name}: {shard.documents} documents in {shard.offsets.bytes} bytes"
        for file in shard.files:
            if Path(file.name).name != file.name:
                return f"a file name with a folder in it, {file.name!r}"
    return ""


def check_sizes(folder: Path, index: Index) -> None:
    """Raise `ConfigError` for the first shard that is missing or of another size than the index says."""
    for shard in index.shards:
        for file in shard.files:
            path = folder / file.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ConfigError(
                    f"{path}: {error.strerror or error}, but the index names it; copy the folder again, or "
                    "prepare the data again"
                ) from error
            if size != file.bytes:
                raise ConfigError(
                    f"{path}: {size:,} bytes, the index says {file.bytes:,}: it is cut short or of another "
                    "corpus; copy it again, or prepare the data again"
                )


def check_sums(folder: Path, shards: Iterable[Shard]) -> None:
    """Read the files of `shards` and raise `ConfigError` for the first whose SHA-256 is not the index's."""
    for shard in shards:
        for file in shard.files:
            path = folder / file.name
            try:
                found = sha256(path)
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
            if found != file.sha256:
                raise ConfigError(
                    f"{path}: its SHA-256 is {found}, the index says {file.sha256}: its bytes have changed; "
                    "copy it again, or prepare the data again"
                )


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
