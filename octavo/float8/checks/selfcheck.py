"""Does float8 compute here what it should? One small product for each way in which this device multiplies.

Each product of each recipe is made of random operands: cast as the recipe casts them (by kernels, on a GPU),
multiplied by every path that serves the device and by emulation, and compared with a float64 product of what
the casts stand for. The casts themselves are compared, bit for bit, with those that a CPU makes of the same
values. It takes well under a second, and it is what to run first on a new GPU, driver or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.float8.matmul import describe_device, find_path, matmul
from octavo.float8.quantize import Quantized, dequantize, quantize
from octavo.float8.recipe import RECIPES, Gemm

M, N, CONTRACTION = 256, 128, 512  # divide every block, and are small
EXACT, HARDWARE = 1e-5, 1e-2
"""The largest error, relative to the product's norm: of float32 sums, and of what float8 units do, which
write bfloat16 and may add in fewer bits (fast accumulation).
"""


@dataclass(frozen=True)
class Check:
    """One product of `recipe` along one `path` ("emulation", or the name of hardware's).

    error: against float64, relative to the product's norm; NaN where it could not be computed. allowed: what
    it may be. casts_equal: whether the operands' casts have the bits that a CPU gives them. failure: what
    was raised, or an empty string.
    """

    recipe: str
    gemm: str
    path: str
    error: float
    allowed: float
    casts_equal: bool
    failure: str = ""

    @property
    def passed(self) -> bool:
        return self.casts_equal and self.error <= self.allowed


def check_device(device: torch.device) -> Iterator[Check]:
    """Check every product of every recipe on `device`, by hardware where it has a path, and by emulation."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(rows, CONTRACTION, generator=generator) * torch.randn(rows, 1, generator=generator).exp2()
        for rows in (M, N)
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    for recipe in RECIPES.values():
        for name, gemm in recipe.gemms.items():
            if not gemm.float8:
                continue
            yield _check(recipe.name, name, gemm, a, b, device, native=False)
            if find_path(gemm, describe_device(device)) is not None:
                yield _check(recipe.name, name, gemm, a, b, device, native=True)


def _check(
    recipe: str, name: str, gemm: Gemm, a: Tensor, b: Tensor, device: torch.device, *, native: bool
) -> Check:
    assert gemm.a is not None
    assert gemm.b is not None
    found = find_path(gemm, describe_device(device)) if native else None
    path = found.name if found is not None else "emulation"
    allowed = HARDWARE if native and device.type == "cuda" else EXACT
    here_a, here_b = quantize(a, gemm.a), quantize(b, gemm.b)
    exact = dequantize(here_a, gemm.a.block).double() @ dequantize(here_b, gemm.b.block).double().t()
    try:
        there_a, there_b = quantize(a.to(device), gemm.a), quantize(b.to(device), gemm.b)
        out = a.dtype if native else torch.float32
        y = matmul(there_a, there_b, gemm, out, emulate=not native).cpu()
    except Exception as raised:  # whatever a driver, a compiler or torch says is what the check is after
        text = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        return Check(recipe, name, path, float("nan"), allowed, False, text[:300])
    same = _same_bits(here_a, there_a) and _same_bits(here_b, there_b)
    error = ((y.double() - exact).norm() / exact.norm()).item()
    return Check(recipe, name, path, error, allowed, same)


def _same_bits(one: Quantized, other: Quantized) -> bool:
    data = torch.equal(one.data.view(torch.uint8), other.data.cpu().contiguous().view(torch.uint8))
    return data and torch.equal(one.scale, other.scale.cpu())
