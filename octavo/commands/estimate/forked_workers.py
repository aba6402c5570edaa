"""Calls a function in forked processes, two at a time, each with a time limit.

PyTorch caches the names of destroyed process groups in several places, so a process can be only one rank of a
fake process group. A forked worker inherits the imported modules. It computes with one thread, because the
parent's threads do not exist in it.
"""

import gc
import multiprocessing
import multiprocessing.connection
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

LIMIT_SECONDS = 600.0
"""Time limit of one call. The largest models take a tenth of it; very many microbatches can reach it."""
_WORKERS = 2


class TraceFailed(RuntimeError):
    """A worker died or exceeded its time limit."""


def run_forked(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    calls: Sequence[Mapping[str, Any]],
    *,
    limit: float = LIMIT_SECONDS,
) -> list[Any]:
    """Return `function(*args, **call)` for each of `calls`, in order; an exception in a worker is raised
    here.

    Raises:
        TraceFailed: a worker died, or took more than `limit` seconds.
    """
    context = multiprocessing.get_context("fork")
    results: dict[int, Any] = {}
    waiting = list(enumerate(calls))
    running: dict[Any, tuple[int, Any, float]] = {}  # connection -> index, process, deadline
    try:
        while waiting or running:
            while waiting and len(running) < _WORKERS:
                index, call = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_call_and_send, args=(sender, function, args, dict(call)), daemon=True
                )
                process.start()
                sender.close()
                running[receiver] = index, process, time.monotonic() + limit
            remaining = min(deadline for _, _, deadline in running.values()) - time.monotonic()
            ready = multiprocessing.connection.wait(list(running), max(0.0, remaining))
            if not ready:
                raise TraceFailed(f"one of the job's processes could not be traced within {limit:.0f} s")
            for connection in ready:
                index, process, _ = running[connection]
                results[index] = _receive(connection, process)
                process.join()
                del running[connection]
    finally:
        for connection, (_, process, _) in running.items():
            process.kill()
            process.join()
            connection.close()
    return [results[index] for index in range(len(calls))]


def _call_and_send(
    pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], call: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the process ends before garbage matters
    gc.disable()
    answer: tuple[Any, Exception | None]
    try:
        answer = function(*args, **call), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = None, error
    pipe.send(answer)
    pipe.close()


def _receive(connection: Any, process: Any) -> Any:
    try:
        result, error = connection.recv()
    except EOFError:
        process.join()
        raise TraceFailed(
            f"the process that traced one of the job's processes died (exit code {process.exitcode})"
        ) from None
    connection.close()
    if error is not None:
        raise error
    return result
