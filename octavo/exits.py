"""What an exit code of a training command means; the launcher passes on that of the first process that
failed.

A scheduler reads one of them: 75 (EX_TEMPFAIL of sysexits.h) asks for the same command again. Where a signal
ended a run that saves no checkpoints, the code is the shell's for that signal, 128 + its number: the same
command would begin at step 1, and nobody should start it by rule.
"""

import gc
import signal
import sys
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
    """End the process with `code`. Python's last collections, which visit each of the million objects that
    torch consists of, would take a second; what is frozen they leave out.
    """
    gc.freeze()
    sys.exit(code)
