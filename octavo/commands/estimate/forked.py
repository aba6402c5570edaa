"""Calls in processes of their own, two at a time, each with a time limit.

PyTorch keeps the names of process groups that are gone in caches of several places, so a process can be only
one of a fake group's processes. A fork has its modules imported, and computes with one thread, since threads
of the process that forked are not in it.
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
"""Of one call. The largest models take tenths of it; far more microbatches in a pipeline can reach it."""
_AT_A_TIME = 2


class TraceFailed(RuntimeError):
    """A call did not come back."""


def apart(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    calls: Sequence[Mapping[str, Any]],
    *,
    limit: float = LIMIT_SECONDS,
) -> list[Any]:
    """`function(*args, **call)` for each of `calls`, in order. What it raises is raised here.

    Raises:
        TraceFailed: a process died, or took more than `limit` seconds.
    """
    context = multiprocessing.get_context("fork")
    found: dict[int, Any] = {}
    waiting = list(enumerate(calls))
    running: dict[Any, tuple[int, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _AT_A_TIME:
                number, call = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                what = (theirs, function, args, dict(call))
                process = context.Process(target=_answer, args=what, daemon=True)
                process.start()
                theirs.close()
                running[ours] = number, process, time.monotonic() + limit
            rest = min(until for _, _, until in running.values()) - time.monotonic()
            ready = multiprocessing.connection.wait(list(running), max(0.0, rest))
            if not ready:
                raise TraceFailed(f"one of the job's processes could not be traced within {limit:.0f} s")
            for connection in ready:
                number, process, _ = running[connection]
                found[number] = _result(connection, process)
                process.join()
                del running[connection]
    finally:
        for connection, (_, process, _) in running.items():
            process.kill()
            process.join()
            connection.close()
    return [found[number] for number in range(len(calls))]


def _answer(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], call: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the call makes is gone with the process
    gc.disable()
    answer: tuple[Any, Exception | None]
    try:
        answer = function(*args, **call), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = None, error
    pipe.send(answer)
    pipe.close()


def _result(connection: Any, process: Any) -> Any:
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
