"""The exit codes of a training command; the launcher returns that of the first process that failed.

A scheduler acts on one of them: 75 (EX_TEMPFAIL of sysexits.h) means "run the same command again". When a
signal ends a run that saves no checkpoints, the code is 128 + the signal's number, as in a shell: the same
command would begin at step 1, so it should not be rerun automatically.
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

SELF_REPORTED = frozenset({USER_ERROR, NO_CHECKPOINT_VERIFIES})
"""Codes of a process that has printed its reason itself."""

COLLECTIVE = frozenset({BAD_NUMBERS, REQUEUE})
"""Codes that all processes end with together, for the same printed reason."""


def of_signal(number: int) -> int:
    """The exit code of a run that signal `number` ended with nothing saved."""
    return 128 + number


STOPPING: tuple[signal.Signals, ...] = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
)
"""Signals that ask a run to save and stop: from a scheduler, Ctrl-C, `sbatch --signal`, a closed terminal."""


def leave(code: int) -> NoReturn:
    """End the process with `code`, as `sys.exit` does but without destroying every object, which takes 1 to 2
    s with torch loaded. Threads are joined, `atexit` functions called, and output is flushed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):  # the reader is gone, which changes nothing of what was done
            pass
        except OSError:  # a full disk: Python reports it
            sys.exit(code)
    os._exit(code)
