"""What a linear layer costs in a recipe, in four parts, because each is paid a different number of times.

    products   the three matrix products of forward and backward, on operands that are cast   every microbatch
    input      casts of x for output and grad_weight        once for all layers that read x in this recipe
    gradient   casts of dy for grad_input and grad_weight                                     every microbatch
    weight     casts of w for output and grad_input          once a step, or every microbatch

Measured parts are medians of rounds in which all recipes take turns (`roofline/timing.py`), on normal random
numbers in bfloat16. Without a GPU the roofline model gives them (`octavo/roofline`), for the recipes that the
GPU in question has units for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from octavo.commands.tune.linear_sizes import Size
from octavo.config import names
from octavo.float8 import RECIPES, Recipe
from octavo.float8.matmul import Device, choose_backend, find_backend, matmul
from octavo.float8.quantize import Quantized, quantize_both
from octavo.roofline import Gpu, Tensors, cast_seconds, gemm_seconds, linear_shapes
from octavo.roofline.casts import FLOAT8_GEMMS
from octavo.roofline.timing import time_in_turn

HIGH_PRECISION = "high_precision"
# The scales of a previous step are there only in training, which this is not.
CANDIDATES = (HIGH_PRECISION, *(name for name in names.RECIPES if not name.endswith("_previous_step")))

_ROUNDS = 15
# What the roofline's GPUs are to `matmul.GEMM_BACKENDS`; CUDA as of 13.0.
_CAPABILITIES = {
    "h100-nvl": (9, 0),
    "h100-pcie": (9, 0),
    "h100": (9, 0),
    "h200-nvl": (9, 0),
    "h200": (9, 0),
    "b200": (10, 0),
    "l40s": (8, 9),
    "rtx4090": (8, 9),
}
_FINE_BLOCKS = 0.85
"""The share of a float8 product's speed that is left with a scale for every 128 elements of the contraction;
E."""
_LAUNCH, _KERNELS = 4e-6, 3
"""Seconds from one kernel to the next, and the kernels of one tensor's casts: maxima, their reduction, the
cast. What casts of small layers cost is mostly this; E.
"""


@dataclass(frozen=True)
class CostParts:
    """Seconds of each part; see the module's docstring."""

    products: float
    input: float = 0.0
    gradient: float = 0.0
    weight: float = 0.0


Casts = tuple[Quantized | Tensor, Quantized | Tensor]
"""Of one tensor, for the two products that read it."""
Costs = dict[str, CostParts]
"""By recipe, `HIGH_PRECISION` among them."""


def runnable(candidates: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those that `device` computes without emulation, and why it does not compute the others."""
    able, unable = [], {}
    for name in candidates:
        gemms = [] if name == HIGH_PRECISION else RECIPES[name].gemms.values()
        try:
            for gemm in gemms:
                if gemm.float8:
                    choose_backend(gemm, device, False)
        except ValueError as error:
            unable[name] = str(error).split(". ")[0].removeprefix("emulate=False, but ")
        else:
            able.append(name)
    return able, unable


def runnable_on_paper(candidates: Sequence[str], gpu: Gpu) -> tuple[list[str], dict[str, str]]:
    """The same for a GPU of the roofline's table."""
    device = Device("cuda", _CAPABILITIES.get(gpu.name, (0, 0)), (13, 0))
    able, unable = [], {}
    for name in candidates:
        gemms = [] if name == HIGH_PRECISION else RECIPES[name].gemms.values()
        if any(gemm.float8 and find_backend(gemm, device) is None for gemm in gemms):
            unable[name] = f"{gpu.name} has no units for it"
        elif name not in FLOAT8_GEMMS and name != HIGH_PRECISION:
            unable[name] = "the roofline model does not know it"
        else:
            able.append(name)
    return able, unable


def on_paper(size: Size, candidates: Sequence[str], gpu: Gpu) -> Costs:
    """By the roofline model."""
    M, K, N = size
    found: Costs = {}
    for name in candidates:
        recipe = None if name == HIGH_PRECISION else name
        products = 0.0
        for product in ("output", "grad_input", "grad_weight"):
            float8 = product in FLOAT8_GEMMS[recipe]
            seconds = gemm_seconds(gpu, linear_shapes(M, K, N, float8=float8)[product])
            products += seconds / (_FINE_BLOCKS if float8 and name == "blockwise" else 1.0)
        if recipe is None:
            found[name] = CostParts(products)
            continue
        nothing = (0.0, 0.0, 0.0)
        tensors = {
            "input": Tensors((0.0, 0.0, float(M * K)), nothing, 0.0),
            "gradient": Tensors(nothing, (0.0, 0.0, float(M * N)), 0.0),
            "weight": Tensors(nothing, nothing, float(N * K)),
        }
        casts = {
            part: cast_seconds(gpu, what, recipe, "kernels") + _KERNELS * _LAUNCH
            for part, what in tensors.items()
        }
        found[name] = CostParts(products, **casts)
    return found


def measured(
    size: Size,
    candidates: Sequence[str],
    device: torch.device,
    *,
    rounds: int = _ROUNDS,
    emulate: bool | None = None,
) -> Costs:
    """Timed on `device`. `emulate` as in `matmul`; False on a GPU, so that nothing is emulated unnoticed."""
    M, K, N = size
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    x_MK, w_NK, dy_MN = random(M, K), random(N, K), random(M, N)
    sides: dict[tuple[str, str], Callable[[], object]] = {}
    for name in candidates:
        if name == HIGH_PRECISION:
            sides[name, "products"] = partial(_plain_products, x_MK, w_NK, dy_MN)
            continue
        recipe = RECIPES[name]
        o, gi, gw = recipe.output, recipe.grad_input, recipe.grad_weight
        x = partial(quantize_both, x_MK, o.a, gw.b)
        dy = partial(quantize_both, dy_MN, gi.a, gw.a)
        w = partial(quantize_both, w_NK, o.b, gi.b)
        sides |= {(name, "input"): x, (name, "gradient"): dy, (name, "weight"): w}
        sides[name, "products"] = partial(_products, x(), dy(), w(), recipe, emulate)
    named = {f"{name} {part}": call for (name, part), call in sides.items()}
    times = time_in_turn(named, device, rounds=rounds)
    found: Costs = {}
    for name in candidates:
        parts = {part: times[f"{n} {part}"].median for n, part in sides if n == name}
        found[name] = CostParts(**parts)
    return found


def _plain_products(x_MK: Tensor, w_NK: Tensor, dy_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.mm(x_MK, w_NK.t()), torch.mm(dy_MN, w_NK), torch.mm(dy_MN.t(), x_MK)


def _products(x: Casts, dy: Casts, w: Casts, recipe: Recipe, emulate: bool | None) -> list[Tensor]:
    """The three, on what `quantize_both` gave for each tensor."""
    (x_MK, x_KM), (dy_MN, dy_NM), (w_NK, w_KN) = x, dy, w
    pairs = ((x_MK, w_NK), (dy_MN, w_KN), (dy_NM, x_KM))
    return [
        matmul(a, b, gemm, torch.bfloat16, emulate=emulate)
        for (a, b), gemm in zip(pairs, recipe.gemms.values(), strict=True)
    ]
