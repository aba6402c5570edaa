"""What measuring the health of float8 casts costs a training step.

    python benchmarks/health.py [--trainer] [--recipe rowwise] [--compile] [--every 10] [--steps 20] …

One model, one process: a 6-layer Llama takes a measured and an unmeasured step (two microbatches, forward and
backward, and AdamW) in turn, and the one that goes first changes each time, so that both meet the same state
of the machine. The cost at k = `--every` is the median over all pairs of (measured / unmeasured - 1) / k.
All layers are measured, and then those of one block only.

With `--trainer` the trainer itself runs the debug model (2,048 tokens a step) and measures every second step,
so that its writing and judging counts, too.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from octavo import config as job_config
from octavo.float8 import Float8LinearConfig, convert_to_float8_training
from octavo.float8.health import Monitor
from octavo.train import trainer as train
from tests.float8.llama_block import Llama

LAYERS, WARMUP, MICROBATCHES = 6, 2, 2
# dim, hidden, batch, tokens: of a small model on a CPU, 2,048 tokens a step; of an 8B one's on a GPU.
SIZES = {"cpu": (256, 768, 4, 256), "cuda": (4096, 14336, 1, 4096)}


def seconds_in_trainer(recipe: str, compiled: bool, pairs: int) -> dict[str, list[float]]:
    """Steps of the trainer's debug model that were measured, and that were not, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "job.dump_folder": folder,
            "model.converters": "float8",
            "float8.recipe_name": recipe,
            "float8.filter_fqns": "output",
            "float8.health_every": 2,
            "training.seq_len": 256,
            "training.local_batch_size": 8,
            "training.steps": 2 * (WARMUP + pairs),
            "lr_scheduler.warmup_steps": 2,
            "metrics.log_freq": 10_000,
            **({"compile.enable": True} if compiled else {}),
        }
        trainer = train.Trainer(job_config.load([f"--{key}={value}" for key, value in flags.items()]))
        times: dict[str, list[float]] = {"plain": [], "measured": []}
        began = time.perf_counter()
        for step in trainer.steps():
            now = time.perf_counter()
            times["measured" if step % 2 == 0 else "plain"].append(now - began)
            began = time.perf_counter()
    return {side: seconds[WARMUP:] for side, seconds in times.items()}


def report_trainer(options: argparse.Namespace) -> None:
    """Measure, print, and write what `main` writes of a bare loop."""
    times = seconds_in_trainer(options.recipe, options.compile, options.steps)
    pairs = zip(times["measured"], times["plain"], strict=True)
    costs = [(measured / plain - 1) / options.every for measured, plain in pairs]
    quartiles = statistics.quantiles(costs, n=4) if len(costs) > 1 else costs * 3
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
        f"trainer, debug model, {options.recipe}, {'compiled' if options.compile else 'eager'}, "
        f"{len(costs)} pairs: step {statistics.median(times['plain']) * 1e3:.1f} ms; "
        f"health_every = {options.every} costs {statistics.median(costs):.2%} of it, "
        f"quartiles {quartiles[0]:.2%} and {quartiles[2]:.2%}"
    )
    if options.json:
        options.json.write_text(json.dumps({"times": times, "costs": costs}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="rowwise")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--every", type=int, default=10, help="k")
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps, after two that don't count")
    parser.add_argument("--trainer", action="store_true", help="measure in the trainer, not in a bare loop")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--smoke", action="store_true", help="seconds: does it work at all?")
    options = parser.parse_args()
    if options.steps < 1 or options.every < 1:
        parser.error("--steps and --every must be at least 1")
    warnings.simplefilter("ignore")

    if options.trainer:
        report_trainer(options)
        return

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dim, hidden, batch, tokens = (64, 128, 1, 32) if options.smoke else SIZES[device]
    if options.smoke:
        options.steps = 2
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = Llama(LAYERS, dim, hidden).to(device, dtype)
    emulate = True if device == "cpu" else None
    config = replace(Float8LinearConfig.from_recipe_name(options.recipe), emulate=emulate)
    convert_to_float8_training(model, config=config)
    if options.compile:
        for layer in model.layers:
            layer.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    xs = [torch.randn(batch, tokens, dim, device=device, dtype=dtype) for _ in range(MICROBATCHES)]

    def seconds(monitor: Monitor | None) -> float:
        """The time of one step."""
        start = time.perf_counter()
        if monitor is None:
            forward_backward()
        else:
            with monitor.step():
                forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def forward_backward() -> None:
        for x in xs:
            model(x).float().square().mean().backward()

    monitors = {
        "all layers": Monitor(model, every=1),
        "one block": Monitor(model, every=1, filter_fn=lambda module, fqn: fqn.startswith("layers.0.")),
    }
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    result = {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "recipe": options.recipe,
        "compiled": options.compile,
        "pairs": options.steps,
        "every": options.every,
        "costs": {},
    }
    print(
        f"torch {torch.__version__} on {name}, {result['threads']} threads, load {os.getloadavg()[0]:.1f}; "
        f"{options.recipe}, {'compiled' if options.compile else 'eager'}, {options.steps} pairs of steps"
    )
    for which, monitor in monitors.items():
        sides = {"measured": monitor, "plain": None}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for pair in range(WARMUP + options.steps):
            for side in sorted(sides, reverse=bool(pair % 2)):
                times[side].append(seconds(sides[side]))
        pairs = list(zip(times["measured"][WARMUP:], times["plain"][WARMUP:], strict=True))
        costs = [(measured / plain - 1) / options.every for measured, plain in pairs]
        quartiles = statistics.quantiles(costs, n=4) if len(costs) > 1 else costs * 3
        result["costs"][which] = {"median": statistics.median(costs), "quartiles": quartiles, "all": costs}
        plain = statistics.median(times["plain"][WARMUP:])
        print(
            f"{which:10}  step {plain * 1e3:7.1f} ms; measuring at k = {options.every} costs "
            f"{statistics.median(costs):.2%} of it, quartiles {quartiles[0]:.2%} and {quartiles[2]:.2%}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
