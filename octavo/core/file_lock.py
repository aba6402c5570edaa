"""Locks on files, which the system drops when the process ends, however it ends: nothing to clean up."""

import fcntl
from typing import IO


def try_lock(file: IO[str]) -> bool:
    """Take `file` for this process until it is closed; False if another process has it.

    On a file system without locks everyone gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
