"""Documents out of local files, and an exact word on what is wrong where a file is not what its name says.

One `.txt` is one document; `.jsonl` (or `.json`, one object a line, as C4 is distributed) has one a line,
under the key `text`; `.parquet` one a row, in the column `text`. The text formats may be compressed, with
`.gz` after the name.

Two stages, so that the second can run in another process: `read_records` cuts a file into records without
looking into them, and `parse` makes a document of one. What is wrong with one record is a `BadRecord`, which
a `BadRecords` counts and passes over as far as the user allows; what is wrong with a file ends the reading.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from octavo.core.errors import ConfigError

TEXT_KEY = "text"


class Record(NamedTuple):
    """One document as it lies in its file, not yet looked at.

    kind: "text", "json" or "parquet". number: of the line, from 1, or of the row, from 0; 0 for a text file.
    offset: of its first byte in the file, before compression; -1 in parquet. content: None for a null.
    """

    path: str
    kind: str
    number: int
    offset: int
    content: bytes | None

    @property
    def where(self) -> str:
        """The place, to begin a message with."""
        if self.kind == "text":
            return self.path
        if self.kind == "json":
            return f"{self.path}, line {self.number} (offset {self.offset})"
        return f"{self.path}, row {self.number}"


class BadRecord(ConfigError):
    """One record is no document; `record` says which."""

    def __init__(self, message: str, record: Record) -> None:
        super().__init__(message)
        self.record = record._replace(content=None)


class BadRecords:
    """Bad records passed over so far, `limit` of them at most; the setting's name is for messages."""

    def __init__(self, limit: int = 0, setting: str = "training.max_bad_records") -> None:
        self.limit, self._setting = limit, setting
        self.found: dict[tuple[str, int], str] = {}

    def add(self, path: str, number: int, message: str) -> None:
        """Count one; the same record counts once, however often it is read.

        Raises:
            ConfigError: there are more than `limit`.
        """
        if (path, number) in self.found:
            return
        if len(self.found) == self.limit:
            before = f"{self.limit} were passed over before it" if self.limit else "none is passed over"
            raise ConfigError(f"{message} ({self._setting} = {self.limit}: {before})")
        self.found[path, number] = message

    def summary(self) -> str:
        """One line for the log; empty where there were none."""
        if not self.found:
            return ""
        count = len(self.found)
        first = next(iter(self.found.values()))
        return f"{count:,} bad record{'s were' if count > 1 else ' was'} passed over; the first: {first}"


def read_documents(path: Path, bad: BadRecords | None = None, *, pass_empty: bool = False) -> Iterator[str]:
    """The documents of one file in order.

    Args:
        bad: passes over bad records; None: the first one is an error.
        pass_empty: leave empty documents out silently, as a stream of a web corpus does.

    Raises:
        ConfigError: what is wrong, in which file and line or row, and what to do.
    """
    for record in read_records(path):
        try:
            yield parse(record)
        except EmptyRecord as error:
            if not pass_empty:
                _pass_over(error, bad)
        except BadRecord as error:
            _pass_over(error, bad)


def _pass_over(error: BadRecord, bad: BadRecords | None) -> None:
    if bad is None:
        raise error
    bad.add(error.record.path, error.record.number, str(error))


class EmptyRecord(BadRecord):
    """A record without any text."""


def kind_of(path: Path) -> str:
    """What the records of a file are: "text", "json" or "parquet"."""
    name = path.name.lower().removesuffix(".gz")
    return "parquet" if name.endswith(".parquet") else "text" if name.endswith(".txt") else "json"


def read_records(path: Path, key: str = TEXT_KEY, *, after: Record | None = None) -> Iterator[Record]:
    """The records of one file in order; blank lines are none. With `after`, those that follow it.

    Raises:
        ConfigError: the file cannot be read, is cut short, or has no column `key`.
    """
    try:
        kind = kind_of(path)
        if kind == "text":
            if after is None:
                with _open(path) as stream:
                    yield Record(str(path), kind, 0, 0, stream.read())
        elif kind == "json":
            yield from _read_lines(path, after)
        else:
            yield from _read_rows(path, key, -1 if after is None else after.number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}: the compressed data is cut short or damaged ({error}); copy the file again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_lines(path: Path, after: Record | None) -> Iterator[Record]:
    name, number, offset = str(path), 0, 0
    with _open(path) as stream:
        if after is not None:
            stream.seek(after.offset)
            number, offset = after.number, after.offset + len(stream.readline())
        for line in stream:
            number += 1
            if not line.isspace():
                yield Record(name, "json", number, offset, line)
            offset += len(line)


def _read_rows(path: Path, key: str, after: int) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: parquet needs the package `pyarrow`: pip install 'octavo[train]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if key not in names:
                there = ", ".join(names) or "none"
                raise ConfigError(
                    f"{path}: no column {key!r} (there: {there}); rename the one that holds the text"
                )
            kind = table.schema_arrow.field(key).type
            if not any(is_text(kind) for is_text in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
                raise ConfigError(f"{path}: the column {key!r} holds {kind}, not strings")
            as_bytes = pyarrow.large_binary() if pyarrow.types.is_large_string(kind) else pyarrow.binary()
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                # as bytes: text that is not UTF-8 is then a matter of one row, not of the batch
                for value in batch.column(0).cast(as_bytes).to_pylist():
                    if row > after:
                        yield Record(str(path), "parquet", row, -1, value)
                    row += 1
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: not a parquet file that can be read ({error}); copy it again") from error


def parse(record: Record, key: str = TEXT_KEY) -> str:
    """The document that a record holds; never empty.

    Raises:
        BadRecord: it holds none; the message names file, record and offset, and says what to do.
    """
    if record.content is None:
        raise BadRecord(f"{record.where}: {key!r} holds a null, not a string; remove the record", record)
    try:
        text = record.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{record.where}: byte {error.start} ({record.content[error.start]:#04x}) is not UTF-8; convert "
            "the file, for example with `iconv -f latin1 -t utf-8`, or remove the record",
            record,
        ) from error
    if record.kind == "json":
        text = _json_field(text, record, key)
    if not text:
        raise EmptyRecord(f"{record.where}: the document is empty; remove it", record)
    return text


def _json_field(line: str, record: Record, key: str) -> str:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        end = (
            ""
            if line.endswith("\n")
            else "; it is the last line and has no line end, so the file may be cut short"
        )
        raise BadRecord(
            f"{record.where}: not a JSON object on one line ({error}){end}. Remove the line or write the "
            "file again",
            record,
        ) from error
    if not isinstance(fields, dict):
        raise BadRecord(
            f'{record.where}: holds a {type(fields).__name__}, not an object; expected {{"{key}": …}}', record
        )
    if key not in fields:
        keys = ", ".join(sorted(map(str, fields))) or "none"
        raise BadRecord(
            f"{record.where}: no key {key!r} (there: {keys}); rename the key that holds the text", record
        )
    value = fields[key]
    if not isinstance(value, str):
        raise BadRecord(f"{record.where}: {key!r} holds a {type(value).__name__}, not a string", record)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{record.where}: {key!r} holds half a surrogate pair ({value[error.start]!a}), which is "
            "no text; remove the record",
            record,
        ) from error
    return value
