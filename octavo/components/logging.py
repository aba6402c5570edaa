"""One logger for the trainer; its lines begin with `[octavo]`."""

import logging
import sys

logger = logging.getLogger("octavo")


def init_logger() -> None:
    """Send the log to standard error, once, whatever other libraries did to the root logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[octavo] %(asctime)s - %(levelname)s - %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
