"""What the kernels of one Llama3-8B layer read and write on a GPU; needs triton, but no GPU.

    python benchmarks/layer_traffic.py                     # every recipe, plain and fused: a line each
    python benchmarks/layer_traffic.py rowwise --fused     # every kernel of one

Each layer is traced with fake tensors through dynamo, AOT autograd and the partitioner, with the kernels and
products of an H100 (a B200 for mxfp8): `octavo/float8/checks/traced.py` has the method. Counted are a step of
one microbatch of 8,192 tokens, and, apart, the casts of weights, once per optimizer step.

casts: bytes read and written by casting, maxima included; producers: fused kernels that also compute the
maxima. saved: for backward, without weights and their casts. times: the most often that one tensor is cast
one way, 1 if it is never done again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benchmarks.harness import sizes
from octavo.distributed.parallelize_plan import Fusion
from octavo.families import ModelArgs
from octavo.float8 import (
    RECIPES,
    DelayedScaling,
    Float8LinearConfig,
    cast_weights_once,
    convert_to_float8_training,
)
from octavo.float8.checks.fake_gpu import force_hardware_path, force_kernels
from octavo.float8.checks.traced import KernelCall, KernelTraffic, trace, trace_eager
from octavo.float8.fused import GatedLinear, NormedInput, SharedInput
from octavo.models.fused_block import fuse_layer
from octavo.models.transformer import TransformerBlock
from octavo.train.quantization import keep_casts_under_compile

TOKENS = 8192
TUNING = 0.4
"""E: seconds to compile a configuration and to time it (Triton times each for 0.125 s)."""


@dataclass(frozen=True)
class TracedLayer:
    """`layer`: a microbatch, forward and backward. `weights`: their casts, once per step."""

    layer: KernelTraffic
    weights: KernelTraffic
    parameters: int

    @property
    def cast_bytes(self) -> int:
        return self.layer.total("cast") + self.weights.total("cast")


class _Layer(nn.Module):
    def __init__(self, args: ModelArgs, tokens: int) -> None:
        super().__init__()
        self.block = TransformerBlock(args)
        self.rope = nn.Buffer(torch.empty(2, tokens, args.head_width // 2, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.rope)


def trace_layer(
    recipe: str | None,
    *,
    fused: bool = False,
    recompute: bool = False,
    args: ModelArgs | None = None,
    tokens: int = TOKENS,
) -> TracedLayer:
    """One layer of Llama3-8B, or of `args`, in bfloat16 (None) or a recipe, with or without fused modules.

    recompute: `GatedLinear`'s.
    """
    args = args or sizes.model("8B")
    keep_casts_under_compile()
    dtype = torch.get_default_dtype()
    capability = (10, 0) if recipe == "mxfp8" else (9, 0)
    with FakeTensorMode(allow_non_fake_inputs=True), force_kernels(capability):
        try:
            torch.set_default_dtype(torch.bfloat16)
            layer = _Layer(args, tokens)
            x = torch.empty(1, tokens, args.dim, requires_grad=True)
        finally:
            torch.set_default_dtype(dtype)
        if recipe is not None:
            convert_to_float8_training(layer, config=Float8LinearConfig.from_recipe_name(recipe))
            force_hardware_path(layer)
        if recipe == "tensorwise_previous_step":
            scales = DelayedScaling(layer)
            scales.load_state_dict({"just_in_time": False, "amax": dict.fromkeys(scales.statistics, 1.0)})
        if fused:
            fuse_layer(
                layer.block, Fusion(NormedInput, partial(GatedLinear, recompute=recompute), SharedInput)
            )
        parameters = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        scope = cast_weights_once(layer)
        weights = trace_eager(scope.__enter__)
        traced = trace(layer, x)
        scope.__exit__(None, None, None)
    return TracedLayer(traced, weights, parameters)


def line(name: str, traced: TracedLayer, bf16: TracedLayer) -> str:
    layer, kept = traced.layer, sum(traced.layer.saved.values())
    held = sum(bf16.layer.saved.values())
    gb = [layer.total(kind) / 1e9 for kind in ("cast", "producer", "elementwise")]
    per_parameter = traced.weights.total("cast") / traced.parameters
    times = max(layer.times_cast().values(), default=0)
    return (
        f"{name:32} {gb[0]:6.2f} {traced.weights.total('cast') / 1e9:6.2f} {traced.cast_bytes / 1e9:6.2f} "
        f"{per_parameter:5.1f} {gb[1]:9.2f} {gb[2]:11.2f} {kept / 1e9:6.3f} {kept / held:5.2f} {times:5}"
    )


HEADER = (
    f"{'':32} casts GB: layer, weights, all; bytes a parameter; producers, elementwise; saved, of bf16; times"
)


def table(traffic: KernelTraffic) -> str:
    def row(launch: KernelCall) -> str:
        where = "backward" if launch.backward else "forward"
        read, written = launch.read / 1e6, launch.written / 1e6
        cast = f"{launch.operand} by {' and '.join(launch.makes) or 'maxima'}" if launch.operand else ""
        return f"{where:9} {launch.kind:12} {read:8.1f} {written:8.1f}  {launch.name[:48]:48} {cast}"

    kept = [f"saved {size / 1e6:8.1f} MB  {name}" for name, size in traffic.saved.items()]
    head = f"{'':22} {'MB read':>8} {'written':>8}"
    return "\n".join([head, *map(row, traffic.launches), *kept])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", choices=[*RECIPES, "bf16"], help="default: a line for each")
    parser.add_argument("--fused", action="store_true", help="with octavo's fused modules")
    options = parser.parse_args(argv)
    bf16 = trace_layer(None)
    recipes = [*RECIPES] if options.recipe is None else [options.recipe.replace("bf16", "")]
    print(HEADER)
    print(line("bf16", bf16, bf16))
    for recipe in filter(None, recipes):
        for fused in (False, True) if options.recipe is None else (options.fused,):
            traced = trace_layer(recipe, fused=fused)
            print(line(f"{recipe}{' fused' * fused}", traced, bf16), flush=True)
            tried = traced.layer.configurations() + traced.weights.configurations()
            if options.recipe is not None:
                print(f"tuning kernels in the first step: {tried} configurations, E {tried * TUNING:.0f} s")
    if options.recipe is not None:
        shown = bf16 if options.recipe == "bf16" else traced
        print(table(shown.weights), table(shown.layer), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
