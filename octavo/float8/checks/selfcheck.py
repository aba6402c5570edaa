"""Checks that this device computes float8 correctly: one small product per recipe, GEMM and backend.

Random operands are cast as the recipe says (by kernels, on a GPU), multiplied by emulation and by the
hardware backend, if the device has one, and compared with a float64 product of the dequantized operands. The
casts are also compared, bit for bit, with a CPU's casts of the same values. The check takes well under a
second. Run it first on a new GPU, driver or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.float8.gemm_backends import describe_device, find_backend
from octavo.float8.matmul import matmul
from octavo.float8.quantize import Quantized, dequantize, quantize
from octavo.float8.recipe import RECIPES, Gemm

M, N, CONTRACTION = 256, 128, 512  # divide every block, and are small
EXACT, HARDWARE = 1e-5, 1e-2
"""Error limits relative to the product's norm: for float32 sums, and for float8 units, which write bfloat16
and may accumulate in fewer bits (fast accumulation).
"""


@dataclass(frozen=True)
class Check:
    """Result of one product of `recipe` by one `backend` ("emulation", or the hardware backend's name).

    error: distance from float64, relative to the product's norm; NaN if the product raised. allowed: its
    limit. casts_equal: whether the operands' casts have the same bits as a CPU's. failure: the error message
    if one was raised, else an empty string.
    """

    recipe: str
    gemm: str
    backend: str
    error: float
    allowed: float
    casts_equal: bool
    failure: str = ""

    @property
    def passed(self) -> bool:
        return self.casts_equal and self.error <= self.allowed


def check_device(device: torch.device) -> Iterator[Check]:
    """Check every product of every recipe on `device`, emulated and, where it has a backend, in hardware."""
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
            if find_backend(gemm, describe_device(device)) is not None:
                yield _check(recipe.name, name, gemm, a, b, device, native=True)


def _check(
    recipe: str, name: str, gemm: Gemm, a: Tensor, b: Tensor, device: torch.device, *, native: bool
) -> Check:
    assert gemm.a is not None
    assert gemm.b is not None
    hardware = find_backend(gemm, describe_device(device)) if native else None
    backend = hardware.name if hardware is not None else "emulation"
    allowed = HARDWARE if native and device.type == "cuda" else EXACT
    here_a, here_b = quantize(a, gemm.a), quantize(b, gemm.b)
    exact = dequantize(here_a, gemm.a.block).double() @ dequantize(here_b, gemm.b.block).double().t()
    try:
        there_a, there_b = quantize(a.to(device), gemm.a), quantize(b.to(device), gemm.b)
        out = a.dtype if native else torch.float32
        y = matmul(there_a, there_b, gemm, out, emulate=not native).cpu()
    except Exception as raised:  # any error of a driver, a compiler or torch is a result of the check
        text = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        return Check(recipe, name, backend, float("nan"), allowed, False, text[:300])
    same = _same_bits(here_a, there_a) and _same_bits(here_b, there_b)
    error = ((y.double() - exact).norm() / exact.norm()).item()
    return Check(recipe, name, backend, error, allowed, same)


def _same_bits(one: Quantized, other: Quantized) -> bool:
    data = torch.equal(one.data.view(torch.uint8), other.data.cpu().contiguous().view(torch.uint8))
    return data and torch.equal(one.scale, other.scale.cpu())
