"""Finds the text files of a corpus and reads their documents.

A `.txt` file is one document. `.jsonl` (or `.json` with one object per line, like C4) has one document per
line, under the key `text`; `.parquet` has one per row, in the column `text`. The text formats may be
compressed, with `.gz` or `.zst` appended to the name. A file whose first bytes are of another format is an
error.

Reading has two stages, so that the second can run in another process: `read_records` splits a file into
records without decoding them, and `parse` turns a record into a document. A record that is not a document is
a `BadRecord`, which `BadRecords` skips and counts up to the user's limit. An error in a file ends the
reading.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from octavo.core.errors import ConfigError
from octavo.core.fs import check_regular, open_to_read
from octavo.core.logging import logger

COMPRESSIONS = (".gz", ".zst")
FORMATS = (
    *(f"{kind}{end}" for kind in (".txt", ".jsonl", ".json") for end in ("", *COMPRESSIONS)),
    ".parquet",
)
TEXT_KEY = "text"


def find_files(root: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """The readable files at or below `root`, sorted by path so that the corpus is the same on every machine.

    Hidden files and folders are skipped; files of other formats are skipped and logged. A file that is also
    reached through a symbolic link counts once.

    Raises:
        ConfigError: `root` does not exist or contains no file of a known format; or one of these files is a
            dead link or not a regular file, such as a pipe.
    """
    if root.is_file():
        if not root.name.lower().endswith(formats):
            raise ConfigError(f"{root}: not a supported format; supported are {', '.join(formats)}")
        return [root]
    if not root.is_dir():
        _check_regular(root)
        raise ConfigError(
            f"{root}: no such file or folder; give the path of a folder of {', '.join(formats)} files"
        )
    found, others, visited = [], Counter[str](), set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a symbolic link to a parent folder
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(formats):
                found.append(Path(folder, name))
                _check_regular(found[-1])
            else:
                others[Path(name).suffix or "no suffix"] += 1
    listed = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(5))
    if not found:
        listed = listed or "no files at all"
        raise ConfigError(f"{root}: no file of a supported format ({', '.join(formats)}); found {listed}")
    if others:
        logger.info("%s: files of other formats are not read: %s", root, listed)
    found.sort(key=lambda path: (path.is_symlink(), path.relative_to(root).as_posix()))
    once = {os.path.realpath(path): path for path in reversed(found)}
    return sorted(once.values(), key=lambda path: path.relative_to(root).as_posix())


def _check_regular(path: Path) -> None:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        if not path.is_symlink():
            return
        raise ConfigError(
            f"{path}: links to {os.readlink(path)}, which does not exist; remove the link"
        ) from None
    if not regular:
        raise ConfigError(f"{path}: not a regular file; remove it")


class Record(NamedTuple):
    """The raw bytes of one document, not yet decoded.

    Attributes:
        kind: "text", "json" or "parquet".
        number: the line, from 1, or the row, from 0; 0 for a text file.
        offset: of the first byte in the uncompressed file; -1 for parquet.
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
        if self.kind == "text":
            return self.path
        if self.kind == "json":
            return f"{self.path}, line {self.number} (offset {self.offset})"
        return f"{self.path}, row {self.number}"


class BadRecord(ConfigError):
    """A record that is not a document. `record` identifies it and has no content."""

    def __init__(self, message: str, record: Record) -> None:
        super().__init__(message)
        self.record = record._replace(content=None)


class EmptyRecord(BadRecord):
    """A record without any text."""


class BadRecords:
    """The bad records that were skipped, at most `limit`; `setting` names that limit in messages."""

    def __init__(self, limit: int = 0, setting: str = "training.max_bad_records") -> None:
        self.limit, self._setting = limit, setting
        self.found: dict[tuple[str, int], str] = {}

    def add(self, path: str, number: int, message: str) -> None:
        """Count a bad record; reading the same one again does not count.

        Raises:
            ConfigError: there are more than `limit`.
        """
        if (path, number) in self.found:
            return
        if len(self.found) == self.limit:
            skipped = f"{self.limit} were skipped before it" if self.limit else "none is skipped"
            raise ConfigError(f"{message} ({self._setting} = {self.limit}: {skipped})")
        self.found[path, number] = message

    def summary(self) -> str:
        """One line for the log; empty if no record was skipped."""
        if not self.found:
            return ""
        count = len(self.found)
        first = next(iter(self.found.values()))
        return f"{count:,} bad record{'s were' if count > 1 else ' was'} skipped; the first: {first}"


def read_documents(path: Path, bad: BadRecords | None = None, *, skip_empty: bool = False) -> Iterator[str]:
    """The documents of one file, in order.

    Args:
        bad: skips and counts bad records; None: the first one is an error.
        skip_empty: skip empty documents without counting them, for web corpora.

    Raises:
        ConfigError: names the file, the line or row, and the remedy.
    """
    good, skipped = False, ""
    for record in read_records(path):
        try:
            document = parse(record)
        except BadRecord as error:
            if skip_empty and isinstance(error, EmptyRecord):
                continue
            if bad is None:
                raise
            bad.add(error.record.path, error.record.number, str(error))
            skipped = skipped or str(error)
        else:
            good = True
            yield document
    if skipped and not good:
        raise ConfigError(f"{path}: none of its records is a document; the first: {skipped}")


def read_records(path: Path, key: str = TEXT_KEY, *, after: Record | None = None) -> Iterator[Record]:
    """The records of one file, in order, without blank lines. With `after`, those that follow it.

    Raises:
        ConfigError: the file cannot be read, is truncated, or has no column `key`.
    """
    try:
        name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
        if name.endswith(".txt"):
            if after is None:
                with _open(path) as stream:
                    yield Record(str(path), "text", 0, 0, stream.read().removeprefix(UTF8_MARK))
        elif name.endswith(".parquet"):
            yield from _read_rows(path, key, -1 if after is None else after.number)
        else:
            yield from _read_lines(path, after)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}: the compressed data is truncated or damaged ({error}); copy the file again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


UTF8_MARK = b"\xef\xbb\xbf"
_MISNAMED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def _open(path: Path) -> BinaryIO:
    """Open `path` and decompress it; `ConfigError` if its first bytes are of another format."""
    if path.name.lower().endswith(".gz"):
        stream: Any = gzip.open(check_regular(path))  # noqa: SIM115 - the caller closes it
    elif path.name.lower().endswith(".zst"):
        pyarrow = _import_pyarrow(path, ".zst")
        stream = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    else:
        stream = open_to_read(path)
    try:
        _check_first_bytes(path, stream.peek(1024)[:1024])
    except BaseException:
        stream.close()
        raise
    return cast(BinaryIO, stream)


def _import_pyarrow(path: Path, purpose: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: {purpose} needs the package `pyarrow`: pip install 'octavo[train]'"
        ) from error
    return pyarrow


def _check_first_bytes(path: Path, first: bytes) -> None:
    for magic, suffix in _MISNAMED.items():
        if first.startswith(magic):
            raise ConfigError(f"{path}: holds compressed data; rename it to {path.name}{suffix}")
    if first.startswith(_UTF16_MARKS) or b"\0" in first:
        kind = "UTF-16 text" if first.startswith(_UTF16_MARKS) else "text with zero bytes: UTF-16, or no text"
        raise ConfigError(
            f"{path}: holds {kind}; convert it, `iconv -f utf-16 -t utf-8 {path.name} > NEW`, or remove it"
        )


def _read_lines(path: Path, after: Record | None) -> Iterator[Record]:
    name, number, offset = str(path), 0, 0
    with _open(path) as stream:
        if after is not None:
            _skip(stream, after.offset)
            number, offset = after.number, after.offset + len(stream.readline())
        for line in stream:
            number += 1
            if not offset and line.startswith(UTF8_MARK):
                line, offset = line[len(UTF8_MARK) :], len(UTF8_MARK)
            if not line.isspace():
                yield Record(name, "json", number, offset, line)
            offset += len(line)


def _skip(stream: BinaryIO, size: int) -> None:
    if stream.seekable():
        stream.seek(size)
        return
    while size and (content := stream.read(min(size, 1 << 20))):
        size -= len(content)


def _read_rows(path: Path, key: str, after: int) -> Iterator[Record]:
    pyarrow = _import_pyarrow(path, "parquet")
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
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                # Cast to bytes, so that text which is not UTF-8 fails for one row and not for the batch.
                for value in batch.column(0).cast(binary).to_pylist():
                    if row > after:
                        yield Record(str(path), "parquet", row, -1, value)
                    row += 1
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: not a readable parquet file ({error}); copy it again") from error


def parse(record: Record, key: str = TEXT_KEY) -> str:
    """The document in a record; never empty.

    Raises:
        BadRecord: it is not a document; the message has file, record, offset and remedy.
        ConfigError: it is a whole text file, and not a document.
    """

    def bad(problem: str) -> ConfigError:
        message = f"{record.location}: {problem}"
        # A text file is one record: skipping it would lose the whole file.
        return ConfigError(message) if record.kind == "text" else BadRecord(message, record)

    if record.content is None:
        raise bad(f"{key!r} is null, not a string; remove the record")
    try:
        text = record.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(
            f"byte {error.start} ({record.content[error.start]:#04x}) is not UTF-8; convert the file, for "
            "example with `iconv -f latin1 -t utf-8`, or remove the record"
        ) from error
    if record.kind == "json":
        text = _parse_json(text, key, bad)
    if not text:
        raise EmptyRecord(f"{record.location}: the document is empty; remove it", record)
    return text


def _parse_json(line: str, key: str, bad: Callable[[str], ConfigError]) -> str:
    """The string under `key` in a JSON object; raises `bad(problem)`."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith("\n") else "; this last line has no line end: the file may be truncated"
        raise bad(
            f"not a JSON object on one line ({error}){hint}. Remove the line or write the file again"
        ) from error
    if not isinstance(fields, dict):
        raise bad(f'a {type(fields).__name__}, not an object; expected {{"{key}": …}}')
    if key not in fields:
        keys = ", ".join(sorted(map(str, fields))) or "none"
        raise bad(f"no key {key!r} (keys: {keys}); rename the key with the text")
    value = fields[key]
    if not isinstance(value, str):
        raise bad(f"{key!r} is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad(
            f"{key!r} contains half a surrogate pair ({value[error.start]!a}), which is not text; remove the "
            "record"
        ) from error
    return value
