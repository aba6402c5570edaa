"""What an exit code of a training command means; the launcher passes on that of the first process that
failed.

A scheduler reads one of them: 75 (EX_TEMPFAIL of sysexits.h) asks for the same command again. Where a signal
ended a run that saves no checkpoints, the code is the shell's for that signal, 128 + its number: the same
command would begin at step 1, and nobody should start it by rule.
"""

import atexit
import os
import signal
import sys
import threading
from typing import NoReturn

DONE = 0
FAILED = 1
USER_ERROR = 2
NO_CHECKPOINT_VERIFIES = 3
BAD_NUMBERS = 4
REQUEUE = 75

SAID = frozenset({USER_ERROR, NO_CHECKPOINT_VERIFIES})
"""Codes of a process that has told its reason itself."""

AGREED = frozenset({BAD_NUMBERS, REQUEUE})
"""Codes that all processes end with, having told the same reason."""


def of_signal(number: int) -> int:
    """The code of a run that signal `number` ended, with nothing saved."""
    return 128 + number


STOPPING: tuple[signal.Signals, ...] = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
)
"""Signals that ask a run to save and stop: a scheduler's, Ctrl-C, one to set by `sbatch --signal`, and the
terminal's end.
"""


def leave(code: int) -> NoReturn:
    """End the process with `code` as `sys.exit` does, but for taking the interpreter apart object by object,
    which takes 1 to 2 s where torch is loaded: threads are waited for, what `atexit` has is called, and what
    was printed is written.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # a full disk, a closed pipe: Python tells of it
        sys.exit(code)
    os._exit(code)
