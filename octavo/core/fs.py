"""Reads and writes files that others may have made or may be reading.

Writing: a reader sees the old content or the new, never a part, whatever ends the process. Reading: only
regular files are opened, because a pipe would block and a device never ends; a file that is read whole has a
largest size.
"""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_READ = 1 << 30
"""Bytes of the largest file that is read whole. The largest tokenizers and indexes have some 30 MB."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, and is removed if it raises.

    A symbolic link at `path` is replaced, not followed. `durable`: the content is on disk before the rename,
    and the rename before this returns, so that a power failure loses neither. Raises OSError.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of the regular file `path`, made if missing. Raises OSError for a symbolic link, and for
    what is no regular file.
    """
    try:
        number = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a symbolic link; remove it", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file; remove it", str(path))
    return number


def open_append(path: Path) -> BinaryIO:
    """Open `path` to append to it, as `open_regular` does."""
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND), "ab")


def write_file(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace `path` by a file that holds `text` in UTF-8, as `replacing` does."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_read(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises OSError: there is none, or it is a pipe, a device, a socket or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a pipe does not wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def check_regular(path: Path) -> Path:
    """`path`, for a library that opens files itself. Raises OSError as `open_to_read` does."""
    open_to_read(path).close()
    return path


def read_whole(path: Path, *, limit: int = LARGEST_READ) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError."""
    with open_to_read(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than the {limit:,} bytes that are read of such a file", str(path))
    return content


def read_json(path: Path) -> Any:
    """The value in a regular JSON file.

    Raises:
        OSError: see `read_whole`.
        ValueError: not JSON, or nested too deeply to be a file that a program wrote.
    """
    try:
        return json.loads(read_whole(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """As `read_json`; ValueError if the value is not an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not a JSON object")
    return value
