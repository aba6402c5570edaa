"""The cost of a linear layer in a recipe, in four parts, because each is paid a different number of times.

    products   the three matrix products of forward and backward, on cast operands            every microbatch
    input      casts of x for output and grad_weight        once for all layers that read x in this recipe
    gradient   casts of dy for grad_input and grad_weight                                     every microbatch
    weight     casts of w for output and grad_input          once per step, or every microbatch

Measured parts are medians of rounds in which all recipes take turns (`roofline/timing.py`), on normal random
numbers in bfloat16. Without a GPU the roofline model (`octavo/roofline`) predicts them, for the recipes that
the named GPU has units for.
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
from octavo.float8.gemm_backends import Device, find_backend
from octavo.float8.matmul import choose_backend, matmul
from octavo.float8.quantize import Quantized, quantize_both
from octavo.float8.recipe import Gemm
from octavo.roofline import Gpu, Tensors, cast_seconds, gemm_seconds, linear_shapes
from octavo.roofline.casts import FLOAT8_GEMMS
from octavo.roofline.timing import time_in_turn

HIGH_PRECISION = "high_precision"
# The recipes with delayed scaling need scales from the previous step of a training run.
CANDIDATES = (HIGH_PRECISION, *(name for name in names.RECIPES if not name.endswith("_previous_step")))

_ROUNDS = 15
# Compute capabilities of the roofline's GPUs, for `GEMM_BACKENDS` as of CUDA 13.0.
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
"""Relative speed of a float8 product with a scale per 128 elements of the contraction (an estimate)."""
_LAUNCH, _KERNELS = 4e-6, 3
"""Seconds from one kernel to the next, and kernels per cast of a tensor (maxima, their reduction, the cast).
They dominate the casts of small layers (an estimate).
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
"""By recipe, including `HIGH_PRECISION`."""


def supported_recipes(candidates: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Return the candidates that `device` computes without emulation, and the reason for each other one."""
    supported, unsupported = [], {}
    for name in candidates:
        try:
            for gemm in _float8_gemms(name):
                choose_backend(gemm, device, False)
        except ValueError as error:
            unsupported[name] = str(error).split(". ")[0].removeprefix("emulate=False, but ")
        else:
            supported.append(name)
    return supported, unsupported


def supported_by_model(candidates: Sequence[str], gpu: Gpu) -> tuple[list[str], dict[str, str]]:
    """As `supported_recipes`, for a GPU of the roofline model."""
    device = Device("cuda", _CAPABILITIES.get(gpu.name, (0, 0)), (13, 0))
    supported, unsupported = [], {}
    for name in candidates:
        if any(find_backend(gemm, device) is None for gemm in _float8_gemms(name)):
            unsupported[name] = f"{gpu.name} has no units for it"
        elif name not in FLOAT8_GEMMS and name != HIGH_PRECISION:
            unsupported[name] = "the roofline model does not include it"
        else:
            supported.append(name)
    return supported, unsupported


def _float8_gemms(name: str) -> list[Gemm]:
    gemms = [] if name == HIGH_PRECISION else RECIPES[name].gemms.values()
    return [gemm for gemm in gemms if gemm.float8]


def predict_costs(size: Size, candidates: Sequence[str], gpu: Gpu) -> Costs:
    """Predict the costs of `size` with the roofline model."""
    M, K, N = size
    costs: Costs = {}
    for name in candidates:
        recipe = None if name == HIGH_PRECISION else name
        products = 0.0
        for product in ("output", "grad_input", "grad_weight"):
            float8 = product in FLOAT8_GEMMS[recipe]
            seconds = gemm_seconds(gpu, linear_shapes(M, K, N, float8=float8)[product])
            products += seconds / (_FINE_BLOCKS if float8 and name == "blockwise" else 1.0)
        if recipe is None:
            costs[name] = CostParts(products)
            continue
        none = (0.0, 0.0, 0.0)
        tensors = {
            "input": Tensors((0.0, 0.0, float(M * K)), none, 0.0),
            "gradient": Tensors(none, (0.0, 0.0, float(M * N)), 0.0),
            "weight": Tensors(none, none, float(N * K)),
        }
        casts = {
            part: cast_seconds(gpu, tensor, recipe, "kernels") + _KERNELS * _LAUNCH
            for part, tensor in tensors.items()
        }
        costs[name] = CostParts(products, **casts)
    return costs


def measure_costs(
    size: Size,
    candidates: Sequence[str],
    device: torch.device,
    *,
    rounds: int = _ROUNDS,
    emulate: bool | None = None,
) -> Costs:
    """Measure the costs of `size` on `device`. `emulate` as in `matmul`; False never emulates."""
    M, K, N = size
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    x_MK, w_NK, dy_MN = random(M, K), random(N, K), random(M, N)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name in candidates:
        if name == HIGH_PRECISION:
            calls[name, "products"] = partial(_plain_products, x_MK, w_NK, dy_MN)
            continue
        recipe = RECIPES[name]
        o, gi, gw = recipe.output, recipe.grad_input, recipe.grad_weight
        x = partial(quantize_both, x_MK, o.a, gw.b)
        dy = partial(quantize_both, dy_MN, gi.a, gw.a)
        w = partial(quantize_both, w_NK, o.b, gi.b)
        calls |= {(name, "input"): x, (name, "gradient"): dy, (name, "weight"): w}
        calls[name, "products"] = partial(_products, x(), dy(), w(), recipe, emulate)
    times = time_in_turn({" ".join(key): call for key, call in calls.items()}, device, rounds=rounds)
    return {
        name: CostParts(**{part: times[f"{n} {part}"].median for n, part in calls if n == name})
        for name in candidates
    }


def _plain_products(x_MK: Tensor, w_NK: Tensor, dy_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.mm(x_MK, w_NK.t()), torch.mm(dy_MN, w_NK), torch.mm(dy_MN.t(), x_MK)


def _products(x: Casts, dy: Casts, w: Casts, recipe: Recipe, emulate: bool | None) -> list[Tensor]:
    """The three products, on the two casts that `quantize_both` returned for each tensor."""
    (x_MK, x_KM), (dy_MN, dy_NM), (w_NK, w_KN) = x, dy, w
    pairs = ((x_MK, w_NK), (dy_MN, w_KN), (dy_NM, x_KM))
    return [
        matmul(a, b, gemm, torch.bfloat16, emulate=emulate)
        for (a, b), gemm in zip(pairs, recipe.gemms.values(), strict=True)
    ]
