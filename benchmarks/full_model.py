"""Llama3-8B whole on one GPU, trained by octavo's own trainer: tokens a second, peak memory, model TFLOP/s.

    python benchmarks/full_model.py --out benchmarks/results       # 8 to 10 minutes on an H100 with 80 GB
    python benchmarks/full_model.py --predict H100
    python benchmarks/full_model.py --smoke                        # the debug model, also on a CPU

What it answers: whether the whole of pretraining (embedding, 32 layers, loss over 128,256 tokens of
vocabulary, optimizer) fits one card at 8,192 tokens without recomputing products, and how fast it is. Every
side is a process of its own, `octavo train` with the flags that the report shows, since two such models do
not fit beside each other: so they cannot take turns step by step. The first side runs once more at the end,
as the control: what lies between its two runs is what warming up, clocks and chance do here.

Figures are the trainer's own (metrics.jsonl), of every step after the warm-up. A side that does not fit is
reported as out of memory, which is an answer, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import sizes
from benchmarks.harness.comparison import CONTROL, Side, judge, predicted_only
from benchmarks.harness.machine import ROOT, Conditions
from benchmarks.harness.options import Options, parse
from benchmarks.harness.report import Report
from octavo.commands.argparser import bounded_int
from octavo.roofline import Block, Gpu, gemm_seconds, layer_time, linear_shapes
from octavo.roofline.timing import Spread

TOKENS, STEPS, WARMUP = 8192, 25, 5
SIDES: Mapping[str, Mapping[str, str]] = {
    "rowwise": {"float8.recipe_name": "rowwise"},
    "tensorwise": {"float8.recipe_name": "tensorwise"},
    "bf16": {},
}

REFERENCE = "bf16"

# What makes 8 billion parameters fit: 2 bytes a weight, 2 a gradient, 2 or 4 of moments, no logits whole.
FITTING = {"training.dtype": "bfloat16"}
STATES: Mapping[str, tuple[Mapping[str, str], int]] = {
    "8bit": ({"optimizer.name": "AdamW8bit"}, 2),
    "bfloat16": ({"optimizer.state_dtype": "bfloat16"}, 4),
}
"""Choice -> the trainer's flags for it, and the bytes of both moments of a parameter."""
ON_A_GPU = {
    "model.flavor": "8B",
    "training.seq_len": TOKENS,
    "training.local_batch_size": 1,
    "training.steps": STEPS,
    "activation_checkpoint.mode": "none",
    "compile.enable": "true",
    "training.loss_chunk_tokens": 1024,
}
SMOKE = {
    "model.flavor": "debugmodel",
    "training.seq_len": 32,
    "training.local_batch_size": 1,
    "training.steps": 3,
    "activation_checkpoint.mode": "none",
    "training.loss_chunk_tokens": 16,
}
COMMON = {
    "model.hf_assets_path": "octavo_bpe_2048",
    "training.dataset": "shakespeare",
    "metrics.log_freq": 1,
    "lr_scheduler.warmup_steps": 1,
    "lr_scheduler.decay_ratio": 0,
    "optimizer.lr": 1e-5,
}


def flags_of(side: str, options: Options, dataset: str | None) -> dict[str, Any]:
    """The trainer's flags for a side."""
    flags: dict[str, Any] = COMMON | (SMOKE if options.smoke else ON_A_GPU) | FITTING
    if not options.smoke:
        flags["training.steps"] = options.own.steps
    flags |= STATES[options.own.states][0]
    if dataset is not None:
        flags["training.dataset"] = dataset
    if SIDES[side]:
        flags |= {"model.converters": "float8", "float8.filter_fqns": "output", **SIDES[side]}
    return flags


def train(flags: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """One run: `steps`, the trainer's reports after the warm-up, or `failed`, why there are none."""
    with tempfile.TemporaryDirectory(prefix="octavo-full-model-") as folder:
        argv = [f"--{key}={value}" for key, value in {**flags, "job.dump_folder": folder}.items()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "octavo.train", *argv],
                capture_output=True,
                text=True,
                timeout=seconds,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {seconds:.0f} s"}
        if done.returncode != 0:
            return {"failed": why(done.stderr, done.returncode)}
        text = (Path(folder) / "metrics.jsonl").read_text()
    reports = [report for report in map(json.loads, text.splitlines()) if "tps" in report]
    return {"steps": reports[min(WARMUP, len(reports) - 2) :]}


def why(log: str, code: int) -> str:
    """A failed run in a few words."""
    if "OutOfMemoryError" in log or "CUDA out of memory" in log:
        return "out of memory"
    last = log.strip().splitlines()[-1][:300] if log.strip() else "nothing was printed"
    return f"exit code {code}: {last}"


def predicted(side: str, gpu: Gpu | None, smoke: bool, states: str) -> dict[str, float | None]:
    """Seconds of a step and peak GB by the roofline model: layers, output, loss, and the optimizer's bytes.

    Memory: bfloat16 weights and gradients, moments, what 32 layers save, and 3 GB for the embedding's and the
    loss's parts and the allocator.
    """
    if gpu is None or smoke:
        return {"seconds": None, "peak_gb": None}
    args = sizes.model("8B")
    kv = args.n_kv_heads * args.head_width
    block = Block(args.dim, args.n_heads * args.head_width, kv, args.hidden_dim)
    recipe = SIDES[side].get("float8.recipe_name")
    layers = args.n_layers * layer_time(gpu, block, TOKENS, TOKENS, recipe, way="kernels").total
    head = sum(gemm_seconds(gpu, s) for s in linear_shapes(TOKENS, args.dim, args.vocab_size).values())
    parameters = args.n_layers * block.weights + 2 * args.vocab_size * args.dim
    moments = STATES[states][1]
    optimizer = parameters * (2 + 2 + 2 + 2 * moments) / (gpu.hbm * 0.8)  # weight, gradient, weight; moments
    saved = block.saved(TOKENS)["all" if recipe is None else "kernels"]
    peak = parameters * (2 + 2 + moments) + args.n_layers * saved + 3e9
    return {"seconds": layers + head + optimizer, "peak_gb": peak / 1e9}


def facts_of(steps: list[dict[str, Any]], told: Mapping[str, float | None]) -> dict[str, Any]:
    """Medians of what the trainer reported."""
    peak = max(step["memory_gib"] for step in steps) * 2**30 / 1e9
    known = told["peak_gb"]
    return {
        "tokens_per_second": statistics.median(step["tps"] for step in steps),
        "tflops": statistics.median(step["tflops"] for step in steps),
        "peak_gb": peak,
        "predicted_peak_gb": known,
        "peak_measured_over_predicted": None if known is None else peak / known,
        "loss": steps[-1]["loss"],
    }


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument(
        "--states",
        choices=list(STATES),
        default="8bit" if importlib.util.find_spec("bitsandbytes") else "bfloat16",
        help="the optimizer's moments: 8bit where bitsandbytes is installed, else bfloat16",
    )
    parser.add_argument("--steps", type=bounded_int(2), default=STEPS)
    parser.add_argument("--no-control", action="store_true", help="run the first side only once")
    parser.add_argument("--dataset", help="training.dataset; the shipped corpus if not given")
    options = parse(__doc__, rounds=1, minutes=10.0, parser=parser)
    names = ["rowwise", "bf16"] if options.smoke else options.own.sides
    report = Report("full_model", options, flags_of(names[0], options, options.own.dataset))
    report.columns = {
        "tokens_per_second": "{:,.0f} tokens/s",
        "tflops": "{:.4g} TFLOP/s",
        "peak_gb": "{:.1f} GB peak",
        "predicted_peak_gb": "{:.1f} GB predicted",
    }
    report.begin()
    told = {name: predicted(name, options.gpu, options.smoke, options.own.states) for name in names}
    title = "one optimizer step"
    if options.predict is not None:
        seconds = {name: t["seconds"] for name, t in told.items()}
        report.add(predicted_only(title, seconds, reference=REFERENCE if REFERENCE in seconds else None))
        for name, t in told.items():
            report.summary[f"{name}: peak GB"] = t["peak_gb"]
        return report.finish()
    times: dict[str, Spread] = {}
    sides: dict[str, Side] = {}
    with Conditions(options.device) as conditions:
        for name in [*names, CONTROL]:
            if name == CONTROL and (options.own.no_control or not sides):
                break
            if name != CONTROL and sides and options.budget.over(name):
                continue
            side = next(iter(sides)) if name == CONTROL else name
            left = max(60.0, options.budget.until - time.perf_counter())
            run = train(flags_of(side, options, options.own.dataset), left)
            if "failed" in run:
                report.summary[f"{name}, not run"] = run["failed"]
                continue
            times[name] = Spread(tuple(step["seconds"] for step in run["steps"]))
            if name != CONTROL:
                facts = facts_of(run["steps"], told[name])
                sides[name] = Side(None, told[name]["seconds"], facts)
    if sides:
        times.setdefault(CONTROL, times[next(iter(sides))])
        shortest = min(len(spread.values) for spread in times.values())
        times = {name: Spread(spread.values[:shortest]) for name, spread in times.items()}
        report.add(judge(title, sides, times, reference=REFERENCE if REFERENCE in sides else None))
    return report.finish(conditions)


if __name__ == "__main__":
    whole = main()
    sys.exit(0 if whole["comparisons"] else 1)
