"""The logger of the trainer, whose lines begin with `[octavo]`."""

import logging
import os
import sys

from octavo.core.secrets import redact

logger = logging.getLogger("octavo")


class _Formatter(logging.Formatter):
    """Removes access tokens from messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        text: str = redact(super().format(record))
        return text


def init_logger() -> None:
    """Send the log to standard error once, whatever other libraries did to the root logger."""
    handler = logging.StreamHandler(sys.stderr)
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
