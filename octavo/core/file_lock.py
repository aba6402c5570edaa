"""Locks on files, which the system releases when the process ends, however it ends: nothing to clean up."""

import fcntl
import os
from pathlib import Path
from typing import IO

from octavo.core.fs import open_regular


def open_lock(path: Path) -> IO[bytes]:
    """Open the lock file `path`, made if missing; its contents stay, whoever put it there.

    Raises OSError where it cannot be opened, or is a symbolic link or no regular file.
    """
    return os.fdopen(open_regular(path, os.O_RDWR), "r+b")


def try_lock(file: IO[bytes]) -> bool:
    """Take `file` for this process until it is closed; False if another process has it.

    On a file system without locks every process gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
