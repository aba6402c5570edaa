"""Finds the text files of a corpus and reads their documents, in the formats of `file_formats.py`.

A file whose first bytes are of another format is an error.

Reading has two stages, so that the second can run in another process: `read_records` splits a file into
records without decoding them, and `parse` turns a record into a document. A record that is not a document is
a `BadRecord`, which `BadRecords` skips and counts up to the user's limit. An error in a file ends the
reading.
"""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from octavo.core.errors import ConfigError
from octavo.core.logging import logger
from octavo.data.file_formats import FORMAT_OF, FORMATS, FileFormat, Record, import_package

ENDINGS = tuple(FORMAT_OF)
TEXT_KEY = "text"


def find_files(root: Path, formats: tuple[str, ...] = ENDINGS) -> list[Path]:
    """The readable files at or below `root`, sorted by path so that the corpus is the same on every machine.

    Hidden files and folders are skipped; files of other formats are skipped and logged. A file that is also
    reached through a symbolic link counts once.

    Raises:
        ConfigError: `root` does not exist or contains no file of a known format; or one of these files is a
            dead link or not a regular file, such as a pipe.
    """
    if root.is_file():
        format_of(root, formats)
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


def format_of(path: Path, formats: tuple[str, ...] = ENDINGS) -> FileFormat:
    """The format of `path`, by its ending; `ConfigError` if it is none of `formats`."""
    for ending in formats:
        if path.name.lower().endswith(ending):
            return FORMAT_OF[ending]
    raise ConfigError(f"{path}: not a supported format; supported are {', '.join(formats)}")


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
        row, name = format_of(path), str(path)
        if row.package is not None:
            import_package(row.package, path, row.name)
        for number, offset, content in row.read(path, key, after):
            yield Record(name, row.name, number, offset, content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}: the compressed data is truncated or damaged ({error}); copy the file again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def parse(record: Record, key: str = TEXT_KEY) -> str:
    """The document in a record; never empty.

    Raises:
        BadRecord: it is not a document; the message has file, record, offset and remedy.
        ConfigError: it is a whole text file, and not a document.
    """

    row = FORMATS[record.kind]

    def bad(problem: str) -> ConfigError:
        message = f"{record.location}: {problem}"
        return ConfigError(message) if row.whole else BadRecord(message, record)

    if record.content is None:
        raise bad(f"{key!r} is null, not a string; remove the record")
    try:
        text = record.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(
            f"byte {error.start} ({record.content[error.start]:#04x}) is not UTF-8; convert the file, for "
            "example with `iconv -f latin1 -t utf-8`, or remove the record"
        ) from error
    try:
        text = row.decode(text, key)
    except ValueError as error:
        raise bad(str(error)) from error
    if not text:
        raise EmptyRecord(f"{record.location}: the document is empty; remove it", record)
    return text
