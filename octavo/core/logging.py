"""The logger of the trainer, whose lines begin with `[octavo]`."""

import logging
import os
import sys
import time
from typing import TextIO

from octavo.core.terminal import for_terminal

logger = logging.getLogger("octavo")


class _Formatter(logging.Formatter):
    """Makes messages and tracebacks safe to show. One with `own_colors` has no escapes but our colours."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if getattr(record, "own_colors", False) else for_terminal(text)


class _Handler(logging.StreamHandler[TextIO]):
    """Remembers when it wrote last."""

    wrote = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        _Handler.wrote = time.monotonic()


def last_line() -> float:
    """When the last line was logged, by `time.monotonic`."""
    return _Handler.wrote


def init_logger() -> None:
    """Send the log to standard error once, whatever other libraries did to the root logger."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter("[octavo] %(asctime)s - %(levelname)s - %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def wants_color() -> bool:
    """Whether log lines have colours: on a terminal, or with FORCE_COLOR, which the launcher sets for its
    processes.
    """
    wanted = sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR")
