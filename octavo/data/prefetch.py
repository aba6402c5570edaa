"""Microbatches made ahead of their need, by threads, in the order in which they will be asked for.

Thread j of N makes the microbatches j, j + N, j + 2N, … into a queue of its own, and the reader takes from
the queues in turn: the order needs no agreement between threads, and any N gives the same batches. Threads
and not processes, because what costs time here (tokenising, copying, waiting for a network) releases
Python's lock, and because a batch then needs no copy and an error keeps its type and message.

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

_AHEAD = 4  # microbatches in the queues


@dataclass(frozen=True)
class Prepared:
    """One microbatch, and the state of the loader once it has been handed out."""

    tokens_BS: Tensor
    labels_BS: Tensor
    position: int
    source_state: dict[str, Any]


class ReadAhead:
    """Runs iterators in a thread each, a few items ahead; gives their items in turn.

    What one raises is raised where its item is asked for.
    """

    def __init__(self, iterators: list[Iterator[Prepared]]) -> None:
        depth = -(-_AHEAD // len(iterators))
        self._queues: list[queue.Queue[Prepared | BaseException]] = [
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
    def lost(self) -> bool:
        """Whether this is a forked process, which has the object but not its threads."""
        return os.getpid() != self._process

    def _run(self, items: Iterator[Prepared], out: queue.Queue[Prepared | BaseException]) -> None:
        try:
            for item in items:
                if not self._put(item, out):
                    return
        except BaseException as error:  # handed on to the reader
            self._put(error, out)

    def _put(self, item: Prepared | BaseException, out: queue.Queue[Prepared | BaseException]) -> bool:
        while not self._stop.is_set():
            try:
                out.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __next__(self) -> Prepared:
        if self._failure is None:
            item = self._queues[self._taken % len(self._queues)].get()
            self._taken += 1
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def close(self, timeout: float | None = None) -> None:
        """End the threads, and wait for that `timeout` seconds at most (None: as long as it takes)."""
        if self.lost:  # its locks may be held by threads that are not here
            return
        self._stop.set()
        for waiting in self._queues:
            while not waiting.empty():  # a thread that waits for room need not wait for its time-out
                waiting.get_nowait()
        for thread in self._threads:
            if threading.current_thread() is not thread:  # garbage is collected in any thread
                thread.join(timeout)
