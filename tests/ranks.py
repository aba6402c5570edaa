"""Run a function on several ranks of a gloo group within one test: forked processes, so that it costs 0.1 s, not 4."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _rank(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, store: str, results: Any):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        results.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on each of `world` ranks; returns the results by rank.

    Results travel by pickle; tensors should be sent as lists or numpy arrays' bytes. The first failing rank's traceback
    becomes an `AssertionError`.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank, args=(function, args, rank, world, store, results), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        by_rank: dict[int, Any] = {}
        try:
            for _ in range(world):
                _await_result(processes, results, timeout)
                rank, value, error = results.get()
                assert error is None, f"rank {rank}:\n{error}"
                by_rank[rank] = value
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
    return [by_rank[rank] for rank in range(world)]


def _await_result(processes: list[Any], results: Any, timeout: float) -> None:
    """Wait for a result; an `AssertionError` if a rank died without leaving one, or the time is over."""
    waited = 0.0
    while results.empty():
        dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
        assert not dead or not results.empty(), f"a rank ended with exit code {dead}"
        assert waited < timeout, f"no result within {timeout} s"
        processes[0].join(0.02)
        waited += 0.02
