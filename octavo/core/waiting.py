"""Says what a process is busy with, whenever its log has been silent for a while."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from octavo.core import logging
from octavo.core.format import format_clock

SILENCE = 14.0  # seconds; looking every second, no silence is longer than 15
_LOOK_EVERY = 1.0


@dataclass
class Activity:
    """What the process does now. Compiling, reading or saving may take minutes without a line."""

    what: str = "the start"
    since: float = field(default_factory=time.monotonic)

    def begin(self, what: str) -> None:
        """From now on the process does `what`."""
        self.what, self.since = what, time.monotonic()


activity = Activity()


def remind(now: float) -> None:
    """Log what the process does if nothing has been logged for `SILENCE` seconds before `now`."""
    if now - logging.last_line() >= SILENCE:
        logging.logger.info("Busy with %s, for %s so far", activity.what, format_clock(now - activity.since))


@contextmanager
def reminders() -> Iterator[None]:
    """Call `remind` from a thread until the block ends."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_EVERY):
            remind(time.monotonic())

    thread = threading.Thread(target=watch, name="reminders", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
