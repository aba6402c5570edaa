"""Step time of a float8 Llama on a CPU: octavo's emulation against torchao's `emulate=True`.

    python benchmarks/emulation.py [--steps 20] [--layers 6] [--json results.json]

Both sides run in one process, on the same weights and batch, in turns, so that what else the machine does
falls on both. A step is forward, backward and AdamW. Needs `pip install torchao==0.18.0`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import float8 as octavo

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


def compare(recipe: str, compiled: bool, args: argparse.Namespace) -> dict[str, float | str | bool]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Llama(args.layers, args.dim, args.vocab)
    tokens = torch.randint(args.vocab, (args.batch, args.length + 1))
    sides = {}
    for name, library in (("octavo", octavo), ("torchao", torchao)):
        config = dataclasses.replace(library.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
        converted = library.convert_to_float8_training(
            copy.deepcopy(model), config=config, module_filter_fn=lambda m, fqn: fqn != "output"
        )
        sides[name] = stepper(converted, tokens, compiled)
    for step in sides.values():
        for _ in range(args.warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.steps):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            seconds[name].append(sides[name]())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    spread = {name: statistics.quantiles(times, n=4) for name, times in seconds.items()}
    return {
        "recipe": recipe,
        "compiled": compiled,
        "octavo_ms": medians["octavo"] * 1e3,
        "octavo_iqr_ms": (spread["octavo"][2] - spread["octavo"][0]) * 1e3,
        "torchao_ms": medians["torchao"] * 1e3,
        "torchao_iqr_ms": (spread["torchao"][2] - spread["torchao"][0]) * 1e3,
        "ratio": medians["octavo"] / medians["torchao"],
    }


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

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {platform.processor() or platform.machine()}; "
        f"{args.layers} layers of {args.dim}, "
        f"{args.batch * args.length} tokens a step, {args.steps} steps a side"
    )
    print(f"{'recipe':20} {'mode':9} {'octavo ms':>16} {'torchao ms':>16} {'ratio':>6}")
    results = []
    for mode in args.modes:
        for recipe in args.recipes:
            row = compare(recipe, mode == "compiled", args)
            results.append(row)
            print(
                f"{recipe:20} {mode:9} {row['octavo_ms']:9.1f} ±{row['octavo_iqr_ms']:5.1f}"
                f" {row['torchao_ms']:9.1f} ±{row['torchao_iqr_ms']:5.1f} {row['ratio']:6.3f}",
                flush=True,
            )
    ratios = [float(row["ratio"]) for row in results]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean {mean:.3f} (goal 0.9), worst {max(ratios):.3f} (limit 1.0)")
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "results": results, "mean": mean}, indent=2)
        )


if __name__ == "__main__":
    main()
