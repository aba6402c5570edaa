"""Garbage collection at fixed steps, the same on every process.

Python's automatic collection runs at different times in each process, and each time all processes wait.
"""

import gc
import time

from octavo.core.logging import logger
from octavo.train.hooks import Hook


class GarbageCollector(Hook):
    """Disables automatic collection; collects at the start and every `every` steps."""

    def __init__(self, every: int):
        self._every = every
        self._started = False

    def on_start(self, step: int) -> None:
        if not self._started:
            self._started = True
            gc.disable()
            self._collect("Initial GC collection", generation=2)

    def before_step(self, step: int) -> None:
        """Collect the young generations if `step` is due."""
        if step > 1 and step % self._every == 0:
            self._collect("Performing periodical GC collection", generation=1)

    @staticmethod
    def _collect(reason: str, generation: int) -> None:
        start = time.perf_counter()
        gc.collect(generation)
        logger.info("[GC] %s. %.2f seconds.", reason, time.perf_counter() - start)
