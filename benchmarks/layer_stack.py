"""Eight Llama3-8B layers, 8,192 tokens, forward and backward: bfloat16, torchao's float8 and ours, in turn.

    python benchmarks/layer_stack.py --out benchmarks/results      # 6 to 9 minutes, mostly compiling
    python benchmarks/layer_stack.py --predict H100
    python benchmarks/layer_stack.py --smoke                       # two tiny layers, also on a CPU

What it answers: what float8 gains on a model, with everything that a model has (attention, norms, SwiGLU,
casts that a compiler may or may not fuse), what it saves in memory, and what it costs in precision. All sides
share the parameters and the input, use the same attention kernel, and are compiled layer by layer; the
reference is bfloat16. `fused` are octavo's fused modules.

ms: one forward and backward, gradients set to None before. peak GB: the most that was allocated meanwhile,
weights and gradients among it. saved GB: what is held between forward and backward, beyond what was there
before and the casts of weights. sqnr dB: of the gradients (input, and all linears of the first and the last
layer) against the same layers in float32, mean over tensors; bfloat16's own stands beside it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from benchmarks.harness import sizes
from benchmarks.harness.comparison import Side, compare, predicted_only
from benchmarks.harness.goals import OVER_BF16, OVER_TORCHAO, PEAK_OVER_BF16
from benchmarks.harness.gradients import sqnr, watched
from benchmarks.harness.machine import Conditions
from benchmarks.harness.options import Options, parse
from benchmarks.harness.report import Report
from octavo.commands.argparser import bounded_int
from octavo.families import ModelArgs
from octavo.float8 import RECIPES, Float8LinearConfig, cast_weights_once, convert_to_float8_training
from octavo.metrics.device import fastest_attention
from octavo.models.rope import rope_table
from octavo.models.transformer import TransformerBlock
from octavo.roofline import Block, Gpu, layer_time
from octavo.train.quantization import keep_casts_under_compile

LAYERS, TOKENS = 8, 8192


class Stack(nn.Module):
    """`layers` of a Transformer: h[B, S, D] -> h[B, S, D]."""

    rope: Tensor

    def __init__(self, args: ModelArgs, layers: int):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args) for i in range(layers)})
        self.register_buffer("rope", rope_table(args), persistent=False)

    def forward(self, h_BSD: Tensor) -> Tensor:
        for layer in self.layers.values():
            h_BSD = layer(h_BSD, self.rope)
        return h_BSD


@dataclass(frozen=True)
class Kind:
    """One side: `recipe` (None: bfloat16) by `library`, with fused modules or not."""

    recipe: str | None
    library: str = "octavo"
    fused: bool = False

    @property
    def name(self) -> str:
        if self.recipe is None:
            return "bf16"
        prefix = "torchao " if self.library == "torchao" else ""
        return f"{prefix}{self.recipe}{' fused' if self.fused else ''}"


def _fuses() -> bool:
    return importlib.util.find_spec("octavo.models.fused_block") is not None


def kinds(with_torchao: bool) -> list[Kind]:
    """The sides that exist here, most wanted first: a budget cuts the end off."""
    wanted = [Kind(None)]
    for recipe in ("rowwise", "tensorwise", "tensorwise_previous_step"):
        if recipe in RECIPES:
            wanted += [Kind(recipe, fused=True)] if _fuses() else []
            wanted += [Kind(recipe)]
        if with_torchao and recipe != "tensorwise_previous_step":
            wanted += [Kind(recipe, "torchao")]
    return [*wanted, Kind("rowwise_with_gw_hp"), Kind("blockwise")]


def build(kind: Kind, base: Stack, options: Options) -> tuple[Stack, Callable[[], None]]:
    """`base` as `kind`, with the same parameters; and what must be called after each step."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    emulate = True if options.device.type == "cpu" else None
    after: Callable[[], None] = lambda: None  # noqa: E731
    if kind.library == "torchao":
        import torchao.float8 as torchao

        theirs = replace(torchao.Float8LinearConfig.from_recipe_name(kind.recipe), emulate=bool(emulate))
        torchao.convert_to_float8_training(model, config=theirs)
    elif kind.recipe is not None:
        ours = replace(Float8LinearConfig.from_recipe_name(kind.recipe), emulate=emulate)
        convert_to_float8_training(model, config=ours)
        if "previous_step" in kind.recipe:
            from octavo.float8 import DelayedScaling

            after = DelayedScaling(model).end_step
    if kind.fused:
        _fuse(model)
    if not options.smoke:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
    return model, after


def _fuse(model: Stack) -> None:
    from octavo.distributed.parallelize_plan import Fusion
    from octavo.float8.fused import GatedLinear, NormedInput, SharedInput
    from octavo.models.fused_block import fuse_layer

    for layer in model.layers.values():
        fuse_layer(layer, Fusion(NormedInput, GatedLinear, SharedInput))


def step(model: nn.Module, x: Tensor, dy: Tensor, after: Callable[[], None]) -> None:
    """Forward and backward, with fresh gradients; float8 weights are cast once, as in a step of training."""
    x.grad = None
    for p in model.parameters():
        p.grad = None
    with cast_weights_once(model):
        model(x).backward(dy)
    after()


def memory(model: Stack, x: Tensor, dy: Tensor, device: torch.device, after: Callable[[], None]) -> dict:
    """Bytes held between forward and backward, and on a GPU the peak of a whole step."""
    if device.type == "cpu":
        mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in mine:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        return {"saved_gb": sum(held.values()) / 1e9, "peak_gb": None}
    step(model, x, dy, after)
    x.grad = None
    for p in model.parameters():
        p.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with cast_weights_once(model):
        weights = torch.cuda.memory_allocated() - before
        y = model(x)
        saved = torch.cuda.memory_allocated() - before - weights - y.untyped_storage().nbytes()
        y.backward(dy)
    after()
    return {"saved_gb": saved / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def predicted(
    kind: Kind, gpu: Gpu | None, args: ModelArgs, layers: int, tokens: int
) -> dict[str, float | None]:
    """Seconds of a step, and GB saved, by the roofline model."""
    if gpu is None:
        return {"seconds": None, "saved_gb": None}
    kv = args.n_kv_heads * args.head_width
    block = Block(args.dim, args.n_heads * args.head_width, kv, args.hidden_dim)
    recipe = kind.recipe
    way = "torchao" if kind.library == "torchao" else "fused" if kind.fused else "kernels"
    joins = kind.fused and recipe is not None and not recipe.startswith("tensorwise")  # a scale for each
    seconds = layers * layer_time(gpu, block, tokens, tokens, recipe, way=way, joined=joins).total
    keeps = recipe is None or kind.library == "torchao" or recipe == "rowwise_with_gw_hp"
    held = "all" if keeps else "kernels"
    return {"seconds": seconds, "saved_gb": layers * block.saved(tokens)[held] / 1e9}


def sides_of(base: Stack, x: Tensor, dy: Tensor, options: Options, args: ModelArgs) -> dict[str, Side]:
    """Every side, built, compiled and looked at once; what there was no time to build is noted."""
    layers, tokens = len(base.layers), x.shape[1]
    exact = copy.deepcopy(base).float()
    x32 = x.detach().float().requires_grad_()
    step(exact, x32, dy.float(), lambda: None)
    want = watched(exact, x32, layers)
    del exact, x32
    found: dict[str, Side] = {}
    wanted = kinds(importlib.util.find_spec("torchao") is not None)
    built_by = options.budget.started + 60 * options.budget.minutes * 0.85  # leave time to measure
    for kind in wanted:
        if options.budget.seconds > built_by - options.budget.started:
            options.budget.left_out.append(kind.name)
            continue
        try:
            model, after = build(kind, base, options)
            for _ in range(2):  # compiled code of the first step may not be that of the second
                step(model, x, dy, after)
        except (RuntimeError, ValueError, ImportError) as error:  # a side that fails spoils no other
            options.budget.left_out.append(f"{kind.name} ({type(error).__name__}: {str(error)[:200]})")
            gc.collect()
            continue
        told = predicted(kind, options.gpu, args, layers, tokens)
        facts = {"sqnr_db": sqnr(want, watched(model, x, layers)), "predicted_saved_gb": told["saved_gb"]}
        facts |= memory(model, x, dy, options.device, after)
        found[kind.name] = Side(partial(step, model, x, dy, after), told["seconds"], facts)
    return found


def attention_kernel(args: ModelArgs, x: Tensor) -> str:
    """Name of the kernel that scaled_dot_product_attention takes for these layers."""
    q, kv = (
        torch.empty(1, heads, x.shape[1], args.head_width, device=x.device, dtype=x.dtype, requires_grad=True)
        for heads in (args.n_heads, args.n_kv_heads)
    )
    chosen = torch._fused_sdp_choice(q, kv, kv, None, 0.0, True, enable_gqa=True)
    return SDPBackend(chosen).name


def conclude(report: Report, result: dict[str, Any]) -> None:
    """The figures that the goals are about."""
    sides, summary = result["sides"], report.summary
    for name, goal in OVER_BF16.items():
        if name in sides:
            summary[f"{name} over bf16 (goal {goal} on an H100)"] = sides[name]["speedup"]["median"]
    for recipe, goal in OVER_TORCHAO.items():
        ours = sides.get(f"{recipe} fused", sides.get(recipe))
        theirs = sides.get(f"torchao {recipe}")
        if ours and theirs:
            ratio = theirs["ms"]["median"] / ours["ms"]["median"]
            summary[f"{recipe} over torchao's (goal {goal} on an H100)"] = ratio
    bf16 = sides["bf16"]
    for name, side in sides.items():
        side["saved_over_bf16"] = side["saved_gb"] / bf16["saved_gb"]
        if side["peak_gb"] is not None and name in OVER_BF16:
            summary[f"{name}: peak over bf16's (goal {PEAK_OVER_BF16})"] = side["peak_gb"] / bf16["peak_gb"]


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=bounded_int(1), default=LAYERS)
    parser.add_argument("--tokens", type=bounded_int(1), default=TOKENS)
    options = parse(__doc__, rounds=15, parser=parser)
    args, layers, tokens = sizes.model("8B"), options.own.layers, options.own.tokens
    if options.smoke:
        args, layers, tokens = sizes.SMOKE, 2, 32
    args = replace(args, max_seq_len=tokens)
    report = Report("layer_stack", options, {"layers": layers, "tokens": tokens, "rounds": options.rounds})
    report.columns = {
        "peak_gb": "{:.4g} GB peak",
        "saved_gb": "{:.4g} GB saved",
        "saved_over_bf16": "{:.2f} of bf16",
        "sqnr_db": "{:.1f} dB",
    }
    report.begin()
    title = f"{layers} layers, forward and backward"
    if options.predict is not None:
        told = {
            kind.name: predicted(kind, options.gpu, args, layers, tokens) for kind in kinds(with_torchao=True)
        }
        report.add(predicted_only(title, {name: t["seconds"] for name, t in told.items()}))
        for name, t in told.items():
            report.summary[f"{name}: GB saved"] = t["saved_gb"]
        return report.finish()
    torch.manual_seed(0)
    if not options.smoke:
        keep_casts_under_compile()
        torch._dynamo.config.recompile_limit = 64  # one layer's code serves every side
    dtype = torch.bfloat16
    base = Stack(args, layers).to(options.device, dtype)
    base.rope = rope_table(args).to(options.device)
    for p in base.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    x = torch.randn(1, tokens, args.dim, device=options.device, dtype=dtype).requires_grad_()
    dy = torch.randn_like(x)
    with fastest_attention(), Conditions(options.device) as conditions:
        report.summary["attention"] = attention_kernel(args, x)
        sides = sides_of(base, x, dy, options, args)
        gc.collect()
        result = compare(title, sides, options, facts={"dim": args.dim}, empty_cache=False, warmup=2)
        conclude(report, result)
        report.add(result)
    return report.finish(conditions)


if __name__ == "__main__":
    main()
