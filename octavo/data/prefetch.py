"""Prefetches microbatches in threads, in the order in which they will be requested.

Thread j of N produces the microbatches j, j + N, j + 2N, … into its own queue, and the reader takes from the
queues in turn. The order needs no synchronisation between threads, and any N gives the same batches. Threads
rather than processes, because the expensive work (tokenising, copying, waiting for a network) releases
Python's lock, batches need no copy, and errors keep their type and message.

A source that can only be read forward (`SampleSource.forward_only`) is read by one thread.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_QUEUED_MICROBATCHES = 4


@dataclass(frozen=True)
class Microbatch:
    """One microbatch, and the loader's state after it."""

    tokens_BS: Tensor
    labels_BS: Tensor
    position: int
    source_state: dict[str, Any]


class Prefetcher:
    """Runs each iterator in a thread, a few items ahead, and returns their items in turn.

    An iterator's exception is raised in place of its item.
    """

    def __init__(self, iterators: list[Iterator[Microbatch]]) -> None:
        depth = -(-_QUEUED_MICROBATCHES // len(iterators))
        self._queues: list[queue.Queue[Microbatch | BaseException]] = [
            queue.Queue(maxsize=depth) for _ in iterators
        ]
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._taken = 0
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=self._run, args=pair, name="octavo-data", daemon=True)
            for pair in zip(iterators, self._queues, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def in_forked_child(self) -> bool:
        """Whether this process was forked from the one that started the threads, and so has none of them."""
        return os.getpid() != self._process

    def _run(self, items: Iterator[Microbatch], out: queue.Queue[Microbatch | BaseException]) -> None:
        try:
            for item in items:
                if not self._put(item, out):
                    return
        except BaseException as error:  # raised again in the reader's thread
            self._put(error, out)

    def _put(self, item: Microbatch | BaseException, out: queue.Queue[Microbatch | BaseException]) -> bool:
        while not self._stop.is_set():
            try:
                out.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __next__(self) -> Microbatch:
        if self._failure is None:
            item = self._queues[self._taken % len(self._queues)].get()
            self._taken += 1
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def close(self, timeout: float | None = None) -> None:
        """Stop the threads and wait up to `timeout` seconds for each to end (None: without limit)."""
        if self.in_forked_child:  # its locks may be held by threads that do not exist here
            return
        self._stop.set()
        for waiting in self._queues:
            while not waiting.empty():  # a thread that waits for room need not wait for its time-out
                waiting.get_nowait()
        for thread in self._threads:
            if threading.current_thread() is not thread:  # garbage collection may call this in any thread
                thread.join(timeout)
