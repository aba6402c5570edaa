"""What octavo's checkpoints cost over plain DCP: seconds to save and to load, same tensors, same disk, one
process.

    python benchmarks/checkpoint.py [--megabytes 512] [--rounds 7] [--folder DIR] [--json FILE]

Plain DCP is `dcp.save` and `dcp.load` of the same state dict: model, both moments of AdamW. It syncs its
files, too. octavo's side is `Checkpointer.save` (sync of the folders, manifest, rename; once without hashes,
once with each algorithm) and `Checkpointer.load`, which verifies every file, then loads. The sides take turns
and the one that goes first changes each round, so that all meet the same state of the machine and the disk.
Files are read from the page cache where it holds them: the hardest case for hashing, as there is no disk to
wait for. A result is the median over rounds of octavo's time over plain DCP's in that round: by the clock,
and, for machines that others use too, in processor seconds (which two threads spend twice as fast).
"""

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from octavo.checkpoint.checkpointer import Checkpointer
from octavo.config.schema import Checkpoint

SIDES = ("none", "crc32", "sha256")
LAYERS = 8


def build(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that takes so many 10^6 bytes together with AdamW's state."""
    width = int((megabytes * 1e6 / (3 * 4 * LAYERS)) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """How long `call` takes: by the clock, and of this process's processors."""
    began, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - busy


class Plain:
    """dcp.save and dcp.load, with the state dicts made as octavo makes them."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._folder, self._model, self._optimizer = folder, model, optimizer

    def save(self) -> None:
        """Into a new folder."""
        optimizer = get_optimizer_state_dict(self._model, self._optimizer)["state"]
        state = {"model": get_model_state_dict(self._model), "optimizer": optimizer}
        dcp.save(state, checkpoint_id=self._folder / "step-1")

    def load(self) -> None:
        """In place."""
        optimizer = get_optimizer_state_dict(self._model, self._optimizer)
        state = {"model": get_model_state_dict(self._model), "optimizer": optimizer["state"]}
        dcp.load(state, checkpoint_id=self._folder / "step-1")
        set_model_state_dict(self._model, state["model"])
        set_optimizer_state_dict(self._model, self._optimizer, optimizer)


class Ours:
    """Checkpointer.save and load."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, algorithm: str):
        settings = Checkpoint(enable=True, keep_latest_k=0, hash=algorithm)  # type: ignore[arg-type]
        self._checkpointer = Checkpointer(settings, folder, model, optimizer)

    def save(self) -> None:
        """Into a new folder."""
        self._checkpointer.save(1, 2, {})

    def load(self) -> None:
        """Verify and load in place."""
        assert self._checkpointer.load() is not None


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description="What octavo's checkpoints cost over plain DCP.")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="seconds: does it work at all?")
    options = parser.parse_args()
    if options.smoke:
        options.megabytes, options.rounds = 2, 1
    logging.getLogger().setLevel(logging.WARNING)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="octavo-benchmark-", dir=options.folder) as name:
        result = measure(Path(name), options.megabytes, options.rounds)
    dist.destroy_process_group()
    result["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{result['machine']}; torch {torch.__version__}; {options.megabytes} MB; {options.rounds} rounds")
    for what in ("save", "load"):
        for side in ("plain", *SIDES):
            print(f"{what}  {side:<8}{told(result[what], side, 0)}; processor {told(result[what], side, 1)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def told(times: dict[str, list[tuple[float, float]]], side: str, clock: int) -> str:
    """Median seconds of a side by one of the clocks, and over plain DCP's in the same round."""
    own, plain = ([taken[clock] for taken in times[name]] for name in (side, "plain"))
    ratios = [a / b for a, b in zip(own, plain, strict=True)]
    return (
        f"{statistics.median(own):6.2f} s, x {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def measure(folder: Path, megabytes: int, rounds: int) -> dict:
    """Seconds by what, side and round; a first round is thrown away."""
    model, optimizer = build(megabytes)
    sides = {"plain": Plain(folder / "plain", model, optimizer)}
    sides |= {name: Ours(folder / name, model, optimizer, name) for name in SIDES}
    times = {what: {name: [] for name in sides} for what in ("save", "load")}
    order = list(sides)
    for number in range(rounds + 1):
        for name in order:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()
            taken = seconds(sides[name].save)
            if number:
                times["save"][name].append(taken)
        for name in order:
            taken = seconds(sides[name].load)
            if number:
                times["load"][name].append(taken)
        order = [*order[1:], order[0]]
    return times


if __name__ == "__main__":
    main()
