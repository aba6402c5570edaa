"""Bytes that each process sends in a step, by layout and precision.

    python -m benchmarks.traffic [--seq-len 256] [--json FILE] [--only FSDP]

A step of the debug model (6 layers, width 256) is run on gloo for each layout, in bfloat16 and in the float8
recipes, and what its collectives carry is counted (`octavo/distributed/traffic.py`): exact, on any machine.
Weights count twice where they are gathered for forward and again for backward; gradients are reduced in
float32; activations grow with the tokens of a step, weights and gradients do not.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from octavo import config
from octavo.distributed import mesh
from octavo.distributed.traffic import Traffic
from octavo.train import trainer
from octavo.train.signals import Signals
from octavo.train.watchdog import Watchdog

LAYOUTS: Mapping[str, tuple[int, dict[str, Any]]] = {
    # name -> processes, flags of [parallelism]
    "DDP 2": (2, {"data_parallel_replicate_degree": 2}),
    "FSDP 2": (2, {}),
    "FSDP 2, never resharded": (2, {"fsdp_reshard_after_forward": "never"}),
    "FSDP 4": (4, {}),
    "HSDP 2 x 2": (4, {"data_parallel_replicate_degree": 2}),
    "TP 2": (2, {"tensor_parallel_degree": 2}),
    "FSDP 2, TP 2": (4, {"tensor_parallel_degree": 2}),
    "CP 2": (2, {"context_parallel_degree": 2}),
    "CP 2, ring": (2, {"context_parallel_degree": 2, "context_parallel_rotate_method": "alltoall"}),
    "PP 2": (2, {"pipeline_parallel_degree": 2}),
}
_GATHER = {"float8.enable_fsdp_float8_all_gather": True}
_FLOAT8 = {"model.converters": "float8", "float8.filter_fqns": "output"}
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "bfloat16": {},
    "tensorwise": {**_FLOAT8, "float8.recipe_name": "tensorwise"},
    "rowwise": {**_FLOAT8, "float8.recipe_name": "rowwise"},
}


def flags(layout: str, precision: str, seq_len: int, folder: Path) -> dict[str, Any]:
    """What the step is run with."""
    world, parallelism = LAYOUTS[layout]
    job: dict[str, Any] = {
        "job.dump_folder": folder,
        "training.steps": 2,
        "lr_scheduler.warmup_steps": 1,
        "lr_scheduler.decay_ratio": 0,
        "training.local_batch_size": 1,
        "training.global_batch_size": world,
        "training.seq_len": seq_len,
        "training.mixed_precision_param": "bfloat16",
        "activation_checkpoint.mode": "none",
        **{f"parallelism.{key}": value for key, value in parallelism.items()},
        **PRECISIONS[precision],
    }
    split = ("data_parallel_replicate_degree", "tensor_parallel_degree", "pipeline_parallel_degree")
    data = world // max(1, *(parallelism.get(key, 1) for key in split))
    if precision == "tensorwise" and data > 1:
        job |= _GATHER
    # One sequence a process that reads its own: no accumulation, which would repeat the gathers.
    shared = {"tensor_parallel_degree", "context_parallel_degree", "pipeline_parallel_degree"}
    for key in shared & parallelism.keys():
        job["training.global_batch_size"] //= parallelism[key]
    if "pipeline_parallel_degree" in parallelism:
        job |= {"training.local_batch_size": 2, "training.global_batch_size": 2}
    return job


def _step(rank: int, world: int, port: int, argv: Sequence[str], results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with ExitStack() as stack:
        signals, watchdog = (stack.enter_context(each) for each in (Signals(), Watchdog()))
        steps = trainer.Trainer(config.load(argv), signals, watchdog).steps()
        next(steps)
        with Traffic() as traffic:
            next(steps)
        results.put((rank, dict(traffic.sent)))
        mesh.finish()


def measure(layout: str, precision: str, *, seq_len: int = 256) -> dict[str, int]:
    """Bytes that rank 0 sends in the second step, by what they are."""
    world, _ = LAYOUTS[layout]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="octavo-traffic-") as folder:
        job = flags(layout, precision, seq_len, Path(folder))
        argv = [f"--{key}={value}" for key, value in job.items()]
        processes = [
            context.Process(target=_step, args=(rank, world, port, argv, results)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{layout} in {precision}: exit codes {[p.exitcode for p in processes]}")
        return dict(results.get() for _ in processes)[0]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in MB."""
    lines = [
        "| layout | precision | weights | gradients | activations | all, MB | of bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = [row["sent"].get(kind, 0) / 1e6 for kind in ("weights", "gradients", "activations")]
        high = next(
            other for other in rows if other["layout"] == row["layout"] and other["precision"] == "bfloat16"
        )
        share = sum(row["sent"].values()) / sum(high["sent"].values())
        figures = " | ".join(f"{part:.2f}" for part in (*parts, sum(parts)))
        lines.append(f"| {row['layout']} | {row['precision']} | {figures} | {share:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the bytes here")
    options = parser.parse_args(argv)
    rows = []
    for layout in LAYOUTS:
        if options.only not in layout:
            continue
        for precision in PRECISIONS:
            sent = measure(layout, precision, seq_len=options.seq_len)
            rows.append({"layout": layout, "precision": precision, "sent": sent})
            print(f"{layout}, {precision}: {sum(sent.values()):,} bytes", file=sys.stderr)
    print(f"torch {torch.__version__}, {platform.machine()}, sequences of {options.seq_len}\n")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
