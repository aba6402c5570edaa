"""`y[M, N] = a[M, C] . b[N, C]^T` for float8 operands, in hardware or in emulation.

Emulation computes what float8 hardware does, on any device: it multiplies the codes exactly, adds in float32,
applies the scales and rounds once to the output's dtype. Only the order of additions depends on the library,
so results differ by about 1e-7 of their norm between processors.

    scales               applied                                   why
    powers of two        to the codes                              exact, so the order does not matter
    others, (·, FULL)    to the product                            one scale for a whole sum
    others, along C      to the codes, rounding to float32         one scale for each part of a sum

A float8 code has at most 4 significant bits, so that it is exact in bfloat16, also times a power of two. CPUs
with bfloat16 instructions multiply such operands in bfloat16 and add in float32: as precise as float32, and
several times faster with matrix units (AMX). See `mm_codes`.

Hardware backends are in `gemm_backends.py`. A CPU has one too, `torch._scaled_mm`, but it converts operands
one element at a time. Emulation converts many at once (eager) or fuses the conversion (compiled), so
`emulate=None` emulates on a CPU.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor

from octavo.float8 import gemm_backends
from octavo.float8.gemm_backends import (
    OPERATORS,
    GemmBackend,
    describe_device,
    why_unsupported,
)
from octavo.float8.quantize import Quantized, dequantize, to_float32
from octavo.float8.recipe import FULL, Cast, Gemm, Recipe


class EmulationWarning(UserWarning):
    """float8 runs in emulation, for lack of a backend. Shown once per recipe and type of device."""


def choose_backend(gemm: Gemm, device: torch.device, emulate: bool | None) -> GemmBackend | None:
    """The backend that computes `gemm` on `device`; None means emulation.

    `emulate`: True always emulates. False never does, and raises ValueError if the device has no backend.
    None takes the faster: hardware if there is a backend, except on a CPU (see the module's docstring).
    """
    if emulate or (emulate is None and device.type != "cuda"):
        return None
    kind = describe_device(device)
    backend = gemm_backends.find_backend(gemm, kind)
    if backend is None and emulate is False:
        raise ValueError(
            f"emulate=False, but {why_unsupported(gemm, kind)}. Leave emulate=None to emulate without "
            "hardware, or choose a recipe that this device supports"
        )
    return backend


def describe_backend(recipe: Recipe, device: torch.device, emulate: bool | None) -> str:
    """One line on how `device` computes `recipe`, and why: "hardware: ..." or "emulated: ...".

    Raises ValueError, as training would, if `emulate=False` and `device` lacks a backend.
    """
    gemms = {name: gemm for name, gemm in recipe.gemms.items() if gemm.float8}
    if emulate:
        return "emulated: as requested (emulate=True)"
    chosen = {name: choose_backend(gemm, device, emulate) for name, gemm in gemms.items()}
    hardware = ", ".join(dict.fromkeys(backend.name for backend in chosen.values() if backend is not None))
    kind = describe_device(device)
    missing = "; ".join(
        dict.fromkeys(
            why_unsupported(g, kind) for g in gemms.values() if gemm_backends.find_backend(g, kind) is None
        )
    )
    if not any(chosen.values()):
        if missing:
            return f"emulated: {missing}"
        units = "on bfloat16 units" if MATRIX_UNITS else "in float32"
        return f"emulated: this CPU multiplies float8 codes {units} faster than torch._scaled_mm does"
    if missing:
        return f"hardware: {hardware}; the rest emulated: {missing}"
    return f"hardware: {hardware}"


_warned: set[tuple[str, str]] = set()


def warn_if_emulated(recipe: Recipe, device: torch.device, emulate: bool | None) -> None:
    """Warn, once per recipe and type of device, if `emulate=None` must emulate for lack of a backend.

    Raises ValueError if `emulate=False`.
    """
    if emulate or device.type == "meta":
        return
    kind = describe_device(device)
    unsupported = [
        gemm
        for gemm in recipe.gemms.values()
        if gemm.float8 and gemm_backends.find_backend(gemm, kind) is None
    ]
    if not unsupported:
        return
    if emulate is False:
        choose_backend(unsupported[0], device, emulate)
    if (recipe.name, device.type) not in _warned:
        _warned.add((recipe.name, device.type))
        warnings.warn(
            f"recipe {recipe.name!r} runs in emulation: {why_unsupported(unsupported[0], kind)}. Results "
            "are hardware's, but slow; Float8LinearConfig(emulate=True) requests that and silences this",
            EmulationWarning,
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------------ the product

MATRIX_UNITS = torch.cpu._is_amx_tile_supported()
BFLOAT16_UNITS = MATRIX_UNITS or torch.cpu._is_avx512_bf16_supported()
"""Whether this CPU multiplies bfloat16 faster than float32."""

_precision_lock = threading.Lock()  # the precision setting is global to the process


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """`a[M, C] . b[C, N]` in the operands' dtype, which the recipe sets: autocast must not narrow it."""
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return torch.mm(a, b)
    return torch.mm(a, b)


OPERATORS.define(
    "mm_codes(Tensor a, Tensor b, Tensor[] scales, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(OPERATORS, "mm_codes", "CompositeExplicitAutograd")
def _mm_codes(a: Tensor, b: Tensor, scales: list[Tensor], out_dtype: torch.dtype) -> Tensor:
    """`a[M, C] . b[C, N]`, times `scales`, of float32 tensors whose values are exact in bfloat16; added in
    float32, rounded once.

    Allowing oneDNN bfloat16 makes it use AMX; without AMX, oneDNN's float32 is 1.15 times as fast as torch's
    default on a Zen 4. This is an operator so that compiled code, too, changes the setting only around the
    product: the setting is global to the process, and would round every other product.
    """
    if not BFLOAT16_UNITS or a.device.type != "cpu":
        return _scale_in_place(_mm(a, b), scales).to(out_dtype)
    if out_dtype == torch.bfloat16 and not scales:
        return _mm(a.bfloat16(), b.bfloat16())
    mkldnn: Any = torch.backends.mkldnn
    units = mkldnn.matmul
    with _precision_lock:
        before = units.fp32_precision
        units.fp32_precision = "bf16"
        try:
            y = _mm(a, b)
        finally:
            units.fp32_precision = before
    return _scale_in_place(y, scales).to(out_dtype)


def _scale_in_place(y: Tensor, scales: list[Tensor]) -> Tensor:
    for scale in scales:
        y.mul_(scale)
    return y


@torch.library.register_fake("octavo::mm_codes", lib=OPERATORS)
def _(a: Tensor, b: Tensor, scales: list[Tensor], out_dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


_aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten._scaled_mm.default,
        torch.ops.octavo.scaled_mm_blocks.default,
        torch.ops.octavo.mm_codes.default,
    }
)
"""The operators that compute a layer's products, for selective activation checkpointing to save."""


def _emulate(a: Quantized, b: Quantized, cast_a: Cast, cast_b: Cast, out_dtype: torch.dtype) -> Tensor:
    (values_a, after_a), (values_b, after_b) = _codes(a, cast_a), _codes(b, cast_b)
    if not all(cast.power_of_two or cast.block[1] == FULL for cast in (cast_a, cast_b)):
        return _mm(values_a, values_b.t()).to(out_dtype)
    scales = [s for s in (after_a, None if after_b is None else after_b.t()) if s is not None]
    if len(scales) == 2 and scales[0].numel() == scales[1].numel() == 1:
        scales = [scales[0] * scales[1]]  # one pass over y
    if not torch.compiler.is_compiling():
        # In place, but inside the operator: checkpointing saves its output, which must not change after.
        y: Tensor = torch.ops.octavo.mm_codes(values_a, values_b.t(), scales, out_dtype)
        return y
    y = torch.ops.octavo.mm_codes(values_a, values_b.t(), [], torch.float32 if scales else out_dtype)
    for scale in scales:
        y = y * scale  # the compiler fuses these passes
    return y.to(out_dtype)


def _codes(q: Quantized, cast: Cast) -> tuple[Tensor, Tensor | None]:
    """The float32 values to multiply, and the scales `[rows or 1, 1]` to apply to the product, if any."""
    if cast.power_of_two or cast.block[1] != FULL:
        return dequantize(q, cast.block), None
    rows, block = q.data.shape[0], cast.block[0]
    spread = block not in (1, FULL)
    return to_float32(q.data), q.scale.repeat_interleave(block, 0)[:rows] if spread else q.scale


def matmul(
    a: Quantized | Tensor,
    b: Quantized | Tensor,
    gemm: Gemm,
    out_dtype: torch.dtype,
    *,
    emulate: bool | None = None,
) -> Tensor:
    """`a[M, C] . b[N, C]^T` as `y[M, N]` in `out_dtype`; operands are cast as `gemm` says.

    `emulate` as in `choose_backend`. Any size works, including zero. Raises ValueError if the operands'
    contractions differ, or if `emulate=False` and the device has no backend.
    """
    data_a, data_b = (x.data if isinstance(x, Quantized) else x for x in (a, b))
    if data_a.shape[1] != data_b.shape[1]:
        raise ValueError(
            f"operands {tuple(data_a.shape)} and {tuple(data_b.shape)} have different contractions: they "
            "must agree in the last dimension"
        )
    if gemm.a is None or gemm.b is None:
        return _mm(data_a, data_b.t()).to(out_dtype)
    assert isinstance(a, Quantized)
    assert isinstance(b, Quantized)
    backend = choose_backend(gemm, data_a.device, emulate)
    if 0 in data_a.shape or 0 in data_b.shape:
        return torch.zeros(data_a.shape[0], data_b.shape[0], dtype=out_dtype, device=data_a.device)
    if backend is None:
        return _emulate(a, b, gemm.a, gemm.b, out_dtype)
    return backend.run(a, b, gemm, out_dtype)
