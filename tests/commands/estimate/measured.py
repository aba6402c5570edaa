"""Real training runs whose memory is counted twice: by our tracker, and by PyTorch's own CPU allocator.

The allocator tells the profiler of every block, whoever asked for it: operations' own scratch memory and
compiled code included.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo import config, preflight
from octavo.commands.estimate.memory_tracker import OPTIMIZER, PARAMETERS, MemoryTracker, plain_tensors
from octavo.train.trainer import Trainer
from tests.helpers import ranks
from tests.helpers.launching import TINY, small_corpus

STEPS = 4


@dataclass(frozen=True)
class Measured:
    """Peak bytes of a step after the first: what the tracker saw, and what the allocator gave."""

    tracker: int
    allocator: int


def flags(folder: Path, changes: dict[str, Any]) -> list[str]:
    merged = {
        "job.dump_folder": folder,
        "training.dataset": small_corpus(),
        "training.num_workers": 0,
        **TINY,
        "training.steps": STEPS,
        **changes,
    }
    return [f"--{key}={value}" for key, value in merged.items()]


def _allocated(trainer: Trainer) -> int:
    """Bytes of what is there before the steps: parameters, buffers and optimizer states."""
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *state]
    storages = {
        plain.untyped_storage().data_ptr(): plain.untyped_storage().nbytes()
        for tensor in tensors
        for plain in plain_tensors(tensor)
    }
    return sum(storages.values())


def _run(argv: list[str], rank: int, world: int, port: int, log: str, what: str) -> int:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    job = config.load(argv)
    preflight.check(job, world_size=world, gpus=0)
    trainer = Trainer(job)
    steps = trainer.steps()
    if what == "tracker":
        tracker = MemoryTracker()
        with tracker:
            tracker.claim([*trainer.model.parameters(), *trainer.model.buffers()], PARAMETERS)
            next(steps)
            for state in trainer.optimizer.state.values():
                tracker.claim(state.values(), OPTIMIZER)
            tracker.mark("second")
            for _ in steps:
                tracker.mark("later")
        held = [sum(kinds.values()) for name, kinds in tracker.log.peaks() if name != "start"]
        # The least of the steps: gloo lets go of a buffer when it gets to it, on a busy machine a step later.
        peak = min(held[:-1])  # without what comes after the last
    else:
        next(steps)
        before = _allocated(trainer)
        grads = sum(
            plain.untyped_storage().nbytes()
            for p in trainer.model.parameters()
            if p.grad is not None
            for plain in plain_tensors(p.grad)
        )
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for _ in steps:
                pass
        assert profiler.profiler is not None
        assert profiler.profiler.kineto_results is not None
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        held_now = highest = 0
        for event in events:
            held_now += event.nbytes()
            highest = max(highest, held_now)
        peak = before + highest
        del grads
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return peak


def measure(folder: Path, changes: dict[str, Any], world: int = 1, *, allocator: bool = True) -> Measured:
    """The peaks of rank 0."""
    found = {}
    for what in ("tracker", "allocator") if allocator else ("tracker",):
        where = folder / what
        where.mkdir(parents=True)
        argv, port = flags(where, changes), ranks.free_port()
        calls = [(_run, (argv, rank, world, port, str(where / f"{rank}.log"), what)) for rank in range(world)]
        try:
            found[what] = ranks.fork(calls)[0]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{(where / '0.log').read_text()[-2000:]}") from None
    return Measured(found["tracker"], found.get("allocator", found["tracker"]))
