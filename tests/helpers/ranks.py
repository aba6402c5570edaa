"""Run functions in forked processes within one test, alone or as the ranks of a gloo group: 0.1 s, where
torchrun takes 4.
"""

import gc
import multiprocessing
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.waiting import LIMIT, wait_for

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve_store(port: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    port.recv()  # never: killed


@contextmanager
def store() -> Iterator[int]:
    """The port of a `TCPStore` that outlives each rank, as that of torchrun's agent does.

    In a process of its own: the store's thread looks up the name of whoever connects, and a process that is
    forked meanwhile finds glibc's resolver locked for ever.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    server = context.Process(target=_serve_store, args=(there,), daemon=True)
    server.start()
    try:
        assert here.poll(LIMIT), f"no store within {LIMIT:g} s"
        yield here.recv()
    finally:
        server.kill()
        server.join()


def _call(index: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    gc.freeze()  # what was there before the fork: collecting it would copy every page of it
    try:
        torch.set_num_threads(1)
        results.put((index, function(*args), None))
    except BaseException:
        results.put((index, None, traceback.format_exc()))
        raise


def fork(calls: Sequence[Call]) -> list[Any]:
    """Run all `calls` at the same time, each in its own process; returns their results in order.

    Results travel by pickle. A traceback in one and a process that dies are `AssertionError`s.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_call, args=(index, function, args, results), daemon=True)
        for index, (function, args) in enumerate(calls)
    ]
    for process in processes:
        process.start()
    by_index: dict[int, Any] = {}
    try:
        for _ in processes:
            wait_for("a result of a process", lambda: _has_result(processes, results))
            index, value, error = results.get()
            assert error is None, f"process {index}:\n{error}"
            by_index[index] = value
        for index, process in enumerate(processes):
            process.join(LIMIT)
            assert process.exitcode is not None, f"process {index} did not end within {LIMIT:g} s"
    finally:
        for process in processes:
            process.kill()
    return [by_index[index] for index in range(len(calls))]


def _has_result(processes: list[Any], results: Any) -> bool:
    dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]  # first: its result comes before
    found = not results.empty()
    assert found or not dead, f"a process ended with exit code {dead}"
    return found


def _as_rank(rank: int, world: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    result = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    return result


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on each of `world` ranks of a gloo group; returns the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        calls = [(_as_rank, (rank, world, store, function, args)) for rank in range(world)]
        return fork(calls)
