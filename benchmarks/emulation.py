"""Step time of a float8 Llama on a CPU: octavo's emulation, torchao's `emulate=True`, and high precision.

    python benchmarks/emulation.py [--steps 20] [--layers 6] [--json results.json]

All sides run in one process, on the same weights and batch, in turns, so that what else the machine does
falls on all. A step is forward, backward and AdamW. High precision is the same model with `nn.Linear`s in
float32 and, where the CPU has bfloat16 units, wholly in bfloat16. Needs `pip install torchao==0.18.0`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import machine
from octavo import float8 as octavo
from octavo.float8.matmul import BFLOAT16_UNITS, MATRIX_UNITS

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)  # torchao reports GPU libraries that a CPU build cannot load
import torchao.float8 as torchao  # noqa: E402

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (w(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    def __init__(self, layers: int, dim: int, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Block(dim, 8, 3 * dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def stepper(model: Llama, tokens: Tensor, compiled: bool) -> Callable[[], float]:
    """A function that takes one optimizer step and returns its seconds."""
    if compiled:
        for layer in model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def build_sides(model: Llama, recipes: Sequence[str]) -> dict[str, Llama]:
    """`model` in high precision, and in each recipe by either library."""
    sides = {"float32": copy.deepcopy(model)}
    if BFLOAT16_UNITS:
        sides["bfloat16"] = copy.deepcopy(model).bfloat16()
    for recipe in recipes:
        for name, library in (("octavo", octavo), ("torchao", torchao)):
            config = dataclasses.replace(library.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
            sides[f"{name} {recipe}"] = library.convert_to_float8_training(
                copy.deepcopy(model), config=config, module_filter_fn=lambda m, fqn: fqn != "output"
            )
    return sides


def time_steps(compiled: bool, args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each side's steps."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Llama(args.layers, args.dim, args.vocab)
    tokens = torch.randint(args.vocab, (args.batch, args.length + 1))
    sides = build_sides(model, args.recipes)
    steps = {name: stepper(side, tokens, compiled) for name, side in sides.items()}
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(args.steps):
        order = [*order[1:], order[0]]
        for name in order:
            taken[name].append(steps[name]() * 1e3)
    return taken


def report(mode: str, taken: dict[str, list[float]], recipes: Sequence[str]) -> list[float]:
    """Print a mode's figures; returns octavo's time over torchao's, a recipe each."""
    spread = {name: statistics.quantiles(times, n=4) for name, times in taken.items()}
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, median in medians.items():
        print(f"{mode:9} {name:28} {median:9.1f} ms  ±{spread[name][2] - spread[name][0]:.1f}")
    ratios = []
    for recipe in recipes:
        mine = medians[f"octavo {recipe}"]
        over = {"torchao": mine / medians[f"torchao {recipe}"]}
        over |= {name: mine / medians[name] for name in ("float32", "bfloat16") if name in medians}
        print(f"{mode:9} octavo {recipe:21} / " + ", ".join(f"{k} {v:.3f}" for k, v in over.items()))
        ratios.append(over["torchao"])
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"{mode:9} octavo / torchao: geometric mean {mean:.3f}, worst {max(ratios):.3f}", flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("layers", 6), ("dim", 256), ("vocab", 2048), ("batch", 8), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=15, help="timed steps a side")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--modes", nargs="+", default=("eager", "compiled"), choices=("eager", "compiled"))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: does it work at all?")
    args = parser.parse_args()
    if args.smoke:
        args.layers, args.batch, args.length, args.vocab = 1, 1, 32, 64
        args.steps, args.warmup, args.recipes, args.modes = 2, 1, ["rowwise"], ["eager"]

    device = torch.device("cpu")
    print(
        f"{machine.device_name(device)}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, "
        f"bfloat16 instructions: {'yes' if BFLOAT16_UNITS else 'no'}, "
        f"matrix units: {'yes' if MATRIX_UNITS else 'no'}; "
        f"torch {torch.__version__}; {args.layers} layers of {args.dim}, "
        f"{args.batch * args.length} tokens a step, {args.steps} steps a side"
    )
    results: dict[str, Any] = {}
    for mode in args.modes:
        taken = time_steps(mode == "compiled", args)
        results[mode] = {"ratios": report(mode, taken, args.recipes), "milliseconds": taken}
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.describe(device), **results}, indent=2))


if __name__ == "__main__":
    main()
