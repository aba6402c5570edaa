"""Locks on files, which the system releases when the process ends, however it ends: nothing to clean up."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO


def open_lock(path: Path) -> IO[bytes]:
    """Open the lock file `path`, made if missing; its contents stay, whoever put it there.

    Raises OSError where it cannot be opened, or is a symbolic link or no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a symbolic link; remove it", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file; remove it", str(path))
    return os.fdopen(number, "r+b")


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
