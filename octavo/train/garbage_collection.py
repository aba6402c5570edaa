"""Garbage collection at fixed steps, the same on every process.

Python's automatic collection runs at different times in each process, and each time all processes wait.
"""

import gc
import time
from logging import DEBUG, INFO

from octavo.core.logging import logger
from octavo.train.hooks import Hook

_TOLD = 3  # collections that the log shows; the others are at debug level


class GarbageCollector(Hook):
    """Disables automatic collection; collects at the start and every `every` steps."""

    def __init__(self, every: int):
        self._every = every
        self._started = False
        self._told = 0

    def on_start(self, step: int) -> None:
        if not self._started:
            self._started = True
            gc.disable()
            self._collect("Initial GC collection", generation=2)

    def before_step(self, step: int) -> None:
        """Collect the young generations if `step` is due."""
        if step > 1 and step % self._every == 0:
            self._collect("Performing periodical GC collection", generation=1)

    def _collect(self, reason: str, generation: int) -> None:
        start = time.perf_counter()
        gc.collect(generation)
        self._told += 1
        level = INFO if self._told <= _TOLD else DEBUG
        logger.log(level, "[GC] %s. %.2f seconds.", reason, time.perf_counter() - start)
