"""Where float8 pays: a picture of its speedup over bfloat16 for each linear layer of a model, with casts.

    python -m benchmarks.gemm_heatmap --model llama3 --flavor 8B [--gpu h100] [--recipes tensorwise,rowwise]
                                      [--tokens 1024,8192] [--out speedups.svg] [--json FILE]

One panel a recipe; a row is a linear layer (K inputs, N outputs), a column a number of tokens M, a cell the
time of its three products (output, grad_input, grad_weight) in bfloat16 over their time in float8 with the
casts of input, weight and gradient. Above 1, float8 is faster; layers that stay below are for
`float8.filter_fqns`.

On a machine with a CUDA GPU the cells are measured there (medians of forward and backward of one layer, one
side after the other); elsewhere, or with --gpu, they come from the roofline (`octavo/roofline/`), and the
picture says so: a model of products and casts, without Python's overhead. The SVG needs nothing beside it.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import altair as alt
import torch
from torch import nn

from octavo import models
from octavo.commands.charts import chart_of, to_svg
from octavo.config import ConfigError
from octavo.float8 import Float8Linear
from octavo.roofline import Gpu, Tensors, cast_seconds, find_gpu, gemm_seconds, linear_shapes
from octavo.roofline.casts import FLOAT8_GEMMS

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
SAMPLES, WARMUP = 15, 5

Seconds = Callable[[int, int, int, str | None], float]
"""(M, K, N, recipe or None for bfloat16) -> seconds of one layer's products, and casts."""


@dataclass(frozen=True)
class Picture:
    """speedups: recipe -> layer -> one number for each of `tokens`."""

    title: str
    source: str
    tokens: tuple[int, ...]
    layers: Mapping[str, tuple[int, int]]
    speedups: Mapping[str, Mapping[str, list[float]]]


def layers_of(model: str, flavor: str) -> dict[str, tuple[int, int]]:
    """The model's distinct linear layers, name (its number as *) -> (K inputs, N outputs)."""
    spec = models.get(model)
    args = spec.configure(spec.args(flavor), 2048, 8192) if flavor == "debugmodel" else spec.args(flavor)
    with torch.device("meta"):
        built = spec.build(args)
    found: dict[str, tuple[int, int]] = {}
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear):
            general = ".".join("*" if part.isdigit() else part for part in name.split("."))
            found[general] = (module.in_features, module.out_features)
    return found


def on_paper(gpu: Gpu) -> Seconds:
    """Times from the roofline of `gpu`, casts by kernels of their own."""

    def seconds(M: int, K: int, N: int, recipe: str | None) -> float:
        low = FLOAT8_GEMMS[recipe]
        total = sum(
            gemm_seconds(gpu, linear_shapes(M, K, N, float8=product in low)[product])
            for product in ("output", "grad_input", "grad_weight")
        )
        if recipe is not None:
            tensors = Tensors((0.0, 0.0, float(M * K)), (0.0, 0.0, float(M * N)), float(K * N))
            total += cast_seconds(gpu, tensors, recipe, "kernels")
        return total

    return seconds


def measured(device: torch.device) -> Seconds:
    """Times of one layer's forward and backward on `device`, by CUDA events."""

    def seconds(M: int, K: int, N: int, recipe: str | None) -> float:
        linear = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
        if recipe is not None:
            linear = Float8Linear.from_float(linear, recipe)
        x = torch.randn(M, K, device=device, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(M, N, device=device, dtype=torch.bfloat16)
        times = []
        for sample in range(WARMUP + SAMPLES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            x.grad = linear.weight.grad = None
            begin.record()
            linear(x).backward(dy)
            end.record()
            end.synchronize()
            if sample >= WARMUP:
                times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    return seconds


def speedups(
    layers: Mapping[str, tuple[int, int]], tokens: Sequence[int], recipes: Sequence[str], seconds: Seconds
) -> dict[str, dict[str, list[float]]]:
    """recipe -> layer -> bfloat16's time over float8's, for each number of tokens."""
    return {
        recipe: {
            name: [seconds(M, K, N, None) / seconds(M, K, N, recipe) for M in tokens]
            for name, (K, N) in layers.items()
        }
        for recipe in recipes
    }


def svg(picture: Picture) -> str:
    """The picture as one file without references to others: white at 1, green for faster, red for slower."""
    colours = alt.Scale(
        domain=[0.5, 1, 1.7], range=["#b2182b", "#ffffff", "#1b7837"], clamp=True, interpolate="rgb"
    )
    panels = []
    for recipe, values in picture.speedups.items():
        rows = [
            {"layer": f"{name}  {K:,} → {N:,}", "tokens": f"{M:,}", "speedup": round(speedup, 2)}
            for name, (K, N) in picture.layers.items()
            for M, speedup in zip(picture.tokens, values[name], strict=True)
        ]
        cells = chart_of(rows).encode(
            alt.X("tokens:O", title="tokens M", sort=None).axis(orient="top", labelAngle=0),
            alt.Y("layer:N", title=None, sort=None),
        )
        strong = "datum.speedup > 1.5 || datum.speedup < 0.65"
        words = alt.when(strong).then(alt.value("#fff")).otherwise(alt.value("#222"))
        panel = alt.layer(
            cells.mark_rect(stroke="#ccc").encode(alt.Color("speedup:Q", scale=colours, legend=None)),
            cells.mark_text().encode(text=alt.Text("speedup:Q", format=".2f"), color=words),
        )
        panels.append(panel.properties(title=recipe, height=alt.Step(30)))
    return to_svg(alt.vconcat(*panels, title=alt.Title(picture.title, subtitle=picture.source)))


def picture_of(
    model: str, flavor: str, tokens: Sequence[int], recipes: Sequence[str], gpu: str | None
) -> Picture:
    """Measured here if there is a GPU and no other is named; else from the roofline."""
    layers = layers_of(model, flavor)
    if gpu is None and torch.cuda.is_available():
        device = torch.device("cuda")
        seconds = measured(device)
        source = f"measured on {torch.cuda.get_device_name(device)}, torch {torch.__version__}, eager"
    else:
        found = find_gpu(gpu or "h100")
        if found.float8 is None:
            raise ValueError(f"--gpu {gpu}: {found.name} has no float8 units, so there is no speedup to draw")
        seconds, source = on_paper(found), f"NOT MEASURED: the roofline of {found.name} (octavo/roofline)"
    return Picture(
        f"{model} {flavor}: speedup of float8 over bfloat16, casts included",
        source,
        tuple(tokens),
        layers,
        speedups(layers, tokens, recipes, seconds),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama3")
    parser.add_argument("--flavor", default="8B")
    parser.add_argument("--gpu", help="take this one's roofline, not a measurement")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--out", type=Path, default=Path("speedups.svg"))
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args(argv)
    recipes = options.recipes.split(",")
    try:
        tokens = [int(part) for part in options.tokens.split(",")]
        if unknown := [name for name in recipes if name not in FLOAT8_GEMMS]:
            raise ValueError(f"no recipe is called {unknown[0]!r}")
        if min(tokens) < 1:
            raise ValueError(f"--tokens {options.tokens}: each must be at least 1")
        if options.out.suffix != ".svg":
            raise ValueError(f"--out {options.out}: an SVG is written; name a file that ends in .svg")
        for path in (options.out, options.json):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
        made = picture_of(options.model, options.flavor, tokens, recipes, options.gpu)
    except (ValueError, ConfigError, OSError) as error:
        parser.error(str(error))
    options.out.write_text(svg(made))
    print(f"{made.title} ({made.source}): {options.out}")
    if options.json:
        figures = {
            "source": made.source,
            "tokens": made.tokens,
            "layers": made.layers,
            "speedups": made.speedups,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
