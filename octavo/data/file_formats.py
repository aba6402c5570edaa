"""The file formats of a corpus, one row each, and how their records are read.

To add a format, add a row to `FORMATS`. Folders are searched for its suffixes, with those of `COMPRESSIONS`
appended if it may be compressed; the help and all messages derive from the row.

    read      path, key, last -> number, offset and content of the records after `last` (None: of all)
    decode    text of a record, key -> its document; ValueError with the problem and the remedy

`key` is the name under which the text stands, where the format has names. Readers do not decode, so that
decoding can run in another process. Free of torch.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, cast

from octavo.core.errors import ConfigError
from octavo.core.fs import check_regular, open_to_read

UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Record(NamedTuple):
    """The raw bytes of one document, not yet decoded.

    Attributes:
        kind: the name of its file's format.
        number: the line, from 1, or the row, from 0; 0 for a text file.
        offset: of the first byte in the uncompressed file; -1 where that is not known.
        content: None for a null.
    """

    path: str
    kind: str
    number: int
    offset: int
    content: bytes | None

    @property
    def location(self) -> str:
        """File and line or row, as a prefix of messages."""
        return self.path + FORMATS[self.kind].place.format(record=self)


Content = tuple[int, int, bytes | None]
"""The number, offset and content of a `Record`."""


@dataclass(frozen=True)
class FileFormat:
    """One format of a corpus's files; `read` and `decode` as at the top of this file.

    name: `Record.kind` of its records.
    suffixes: of its files' names, in lower case.
    documents: how many documents a file has, in words.
    place: what follows the path in messages about a `Record`, as a format string.
    whole: whether a file is one record, so that skipping a bad one would lose the file.
    compressed: whether files may be compressed.
    package: what reading needs, from the extra `train`.
    """

    name: str
    suffixes: tuple[str, ...]
    documents: str
    read: Callable[[Path, str, Record | None], Iterator[Content]]
    decode: Callable[[str, str], str] = lambda text, key: text
    place: str = ""
    whole: bool = False
    compressed: bool = True
    package: str | None = None


@dataclass(frozen=True)
class Compression:
    """A compression: the suffix appended to a file's name, its first bytes, and how it is opened."""

    suffix: str
    magic: bytes
    open: Callable[[Path], Any]


def _open_gzip(path: Path) -> Any:
    return gzip.open(check_regular(path))


def _open_zstd(path: Path) -> Any:
    pyarrow = import_package("pyarrow", path, ".zst")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSIONS = (
    Compression(".gz", b"\x1f\x8b", _open_gzip),
    Compression(".zst", b"\x28\xb5\x2f\xfd", _open_zstd),
)


def import_package(name: str, path: Path, purpose: str) -> Any:
    """The module `name`; `ConfigError` with the remedy if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{path}: {purpose} needs the package `{name}`: pip install 'octavo[train]'"
        ) from error


def _open(path: Path) -> BinaryIO:
    """Open `path` and decompress it; `ConfigError` if its first bytes are of another format."""
    name = path.name.lower()
    open_file = next((c.open for c in COMPRESSIONS if name.endswith(c.suffix)), open_to_read)
    stream = open_file(path)
    try:
        _check_first_bytes(path, stream.peek(1024)[:1024])
    except BaseException:
        stream.close()
        raise
    return cast(BinaryIO, stream)


def _check_first_bytes(path: Path, first: bytes) -> None:
    for compression in COMPRESSIONS:
        if first.startswith(compression.magic):
            raise ConfigError(f"{path}: holds compressed data; rename it to {path.name}{compression.suffix}")
    if first.startswith(_UTF16_MARKS) or b"\0" in first:
        kind = "UTF-16 text" if first.startswith(_UTF16_MARKS) else "text with zero bytes: UTF-16, or no text"
        raise ConfigError(
            f"{path}: holds {kind}; convert it, `iconv -f utf-16 -t utf-8 {path.name} > NEW`, or remove it"
        )


def _read_whole(path: Path, key: str, after: Record | None) -> Iterator[Content]:
    if after is None:
        with _open(path) as stream:
            yield 0, 0, stream.read().removeprefix(UTF8_MARK)


def _read_lines(path: Path, key: str, after: Record | None) -> Iterator[Content]:
    number, offset = 0, 0
    with _open(path) as stream:
        if after is not None:
            _skip(stream, after.offset)
            number, offset = after.number, after.offset + len(stream.readline())
        for line in stream:
            number += 1
            if not offset and line.startswith(UTF8_MARK):
                line, offset = line[len(UTF8_MARK) :], len(UTF8_MARK)
            if not line.isspace():
                yield number, offset, line
            offset += len(line)


def _skip(stream: BinaryIO, size: int) -> None:
    if stream.seekable():
        stream.seek(size)
        return
    while size and (content := stream.read(min(size, 1 << 20))):
        size -= len(content)


def _read_rows(path: Path, key: str, after: Record | None) -> Iterator[Content]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(check_regular(path)) as table:
            names = table.schema_arrow.names
            if key not in names:
                raise ConfigError(
                    f"{path}: no column {key!r} (columns: {', '.join(names) or 'none'}); rename the one with "
                    "the text"
                )
            text_type = table.schema_arrow.field(key).type
            is_large = pyarrow.types.is_large_string(text_type)
            if not is_large and not pyarrow.types.is_string(text_type):
                raise ConfigError(f"{path}: the column {key!r} has type {text_type}, not string")
            binary = pyarrow.large_binary() if is_large else pyarrow.binary()
            row, last = 0, -1 if after is None else after.number
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                # Cast to bytes, so that text which is not UTF-8 fails for one row and not for the batch.
                for value in batch.column(0).cast(binary).to_pylist():
                    if row > last:
                        yield row, -1, value
                    row += 1
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: not a readable parquet file ({error}); copy it again") from error


def _decode_json(line: str, key: str) -> str:
    """The string under `key` in a JSON object."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith("\n") else "; this last line has no line end: the file may be truncated"
        raise ValueError(
            f"not a JSON object on one line ({error}){hint}. Remove the line or write the file again"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f'a {type(fields).__name__}, not an object; expected {{"{key}": …}}')
    if key not in fields:
        keys = ", ".join(sorted(map(str, fields))) or "none"
        raise ValueError(f"no key {key!r} (keys: {keys}); rename the key with the text")
    value = fields[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r} contains half a surrogate pair ({value[error.start]!a}), which is not text; remove the "
            "record"
        ) from error
    return value


FORMATS: Mapping[str, FileFormat] = MappingProxyType(
    {
        row.name: row
        for row in (
            FileFormat("text", (".txt",), "one document per file", _read_whole, whole=True),
            FileFormat(
                "json",
                (".jsonl", ".json"),
                "one per line",
                _read_lines,
                _decode_json,
                place=", line {record.number} (offset {record.offset})",
            ),
            FileFormat(
                "parquet",
                (".parquet",),
                "one per row",
                _read_rows,
                place=", row {record.number}",
                compressed=False,
                package="pyarrow",
            ),
        )
    }
)

FORMAT_OF: Mapping[str, FileFormat] = MappingProxyType(
    {
        suffix + end: row
        for row in FORMATS.values()
        for suffix in row.suffixes
        for end in ("", *(c.suffix for c in COMPRESSIONS if row.compressed))
    }
)
"""Every ending of a readable file's name -> its format."""
