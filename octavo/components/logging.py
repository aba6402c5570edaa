"""One logger for the trainer; its lines begin with `[octavo]`."""

import logging
import os
import sys

logger = logging.getLogger("octavo")


def init_logger() -> None:
    """Send the log to standard error, once, whatever other libraries did to the root logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[octavo] %(asctime)s - %(levelname)s - %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def wants_color() -> bool:
    """Colours on a terminal; torchrun's workers have none, so the launcher sets FORCE_COLOR for them."""
    wanted = sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR")
