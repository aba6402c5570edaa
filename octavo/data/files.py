"""Documents out of local files, and an exact word on what is wrong where a file is not what its name says.

One `.txt` is one document; `.jsonl` (or `.json`, one object a line, as C4 is distributed) has one a line,
under the key `text`; `.parquet` one a row, in the column `text`. The text formats may be compressed, with
`.gz` after the name. Files are read in the order of their paths, so that the same folder is the same corpus
on every machine.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from octavo.config.errors import ConfigError

TEXT_KEY = "text"
FORMATS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def find_files(root: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """The readable files at or below `root`, in order of path; hidden files and folders are passed over.

    Raises:
        ConfigError: `root` does not exist, or holds no file of a known format.
    """
    if root.is_file():
        if not root.name.lower().endswith(formats):
            raise ConfigError(f"{root}: not a format that can be read; known are {', '.join(formats)}")
        return [root]
    if not root.is_dir():
        raise ConfigError(
            f"{root}: no such file or folder; give the path of a folder of {', '.join(formats)} files"
        )
    found, others, visited = [], Counter[str](), set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link that leads back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(formats):
                found.append(Path(folder, name))
            else:
                others[Path(name).suffix or "no suffix"] += 1
    if not found:
        seen = (
            ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(5)) or "no files at all"
        )
        raise ConfigError(
            f"{root}: no file of a format that can be read ({', '.join(formats)}); found {seen}"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file in order, empty ones left out.

    Raises:
        ConfigError: what is wrong, in which file and line or row, and what to do.
    """
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        documents = _read_parquet(path)
    elif name.endswith(".txt"):
        documents = _read_text(path)
    else:
        documents = _read_json_lines(path)
    try:
        yield from (document for document in documents if document)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}: the compressed data is cut short or damaged ({error}); copy the file again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: byte {error.start} ({content[error.start]:#04x}) is not UTF-8; convert the file, for "
            "example with `iconv -f latin1 -t utf-8`, or remove the record"
        ) from error


def _read_text(path: Path) -> Iterator[str]:
    with _open(path) as stream:
        yield _decode(stream.read(), str(path))


def _read_json_lines(path: Path) -> Iterator[str]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}, line {number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                end = (
                    ""
                    if line.endswith(b"\n")
                    else "; it is the last line and has no line end, so the file may be cut short"
                )
                raise ConfigError(
                    f"{where}: not a JSON object on one line ({error}){end}. Remove the line or write the "
                    "file again"
                ) from error
            yield _field(record, where)


def _field(record: object, where: str) -> str:
    if not isinstance(record, dict):
        raise ConfigError(
            f'{where}: holds a {type(record).__name__}, not an object; expected {{"{TEXT_KEY}": …}}'
        )
    if TEXT_KEY not in record:
        keys = ", ".join(sorted(map(str, record))) or "none"
        raise ConfigError(f"{where}: no key {TEXT_KEY!r} (there: {keys}); rename the key that holds the text")
    value = record[TEXT_KEY]
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {TEXT_KEY!r} holds a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: {TEXT_KEY!r} holds half a surrogate pair ({value[error.start]!a}), which is no text; "
            "remove the record"
        ) from error
    return value


def _read_parquet(path: Path) -> Iterator[str]:
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
            if TEXT_KEY not in names:
                there = ", ".join(names) or "none"
                raise ConfigError(
                    f"{path}: no column {TEXT_KEY!r} (there: {there}); rename the one that holds the text"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[TEXT_KEY]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise ConfigError(
                            f"{path}, row {row}: {TEXT_KEY!r} holds a {type(value).__name__}, not a string"
                        )
                    yield value
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a parquet file that can be read ({error}); copy it again") from error
