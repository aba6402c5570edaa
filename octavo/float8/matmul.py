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

Each row of `GEMM_BACKENDS` is a hardware backend: the blocks it multiplies, the devices it needs, and the
call. To add a backend, add a row. A CPU has one too, `torch._scaled_mm`, but it converts operands one element
at a time. Emulation converts many at once (eager) or fuses the conversion (compiled), so `emulate=None`
emulates on a CPU.

Hopper needs both operands contiguous along the contraction, with sizes that are multiples of 16 (128 for
block scales). Operands are zero-padded here, where they are one byte per element, and nowhere else.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.float8.quantize import Quantized, dequantize, materialize, to_float32
from octavo.float8.recipe import FULL, Cast, Gemm, Recipe


class EmulationWarning(UserWarning):
    """float8 runs in emulation, for lack of a backend. Shown once per recipe and type of device."""


# --------------------------------------------------------------------------------------- the hardware's calls


def _pad(data: Tensor, rows: int, cols: int) -> Tensor:
    """`data` as contiguous float8, zero-padded to multiples of `rows` and `cols`."""
    pad_rows, pad_cols = -data.shape[0] % rows, -data.shape[1] % cols
    if pad_rows or pad_cols:  # through uint8, since float8 has no fill
        data = F.pad(data.view(torch.uint8), (0, pad_cols, 0, pad_rows)).view(data.dtype)
    return data.contiguous()


def _pad_scale(scale: Tensor, rows: int, cols: int) -> Tensor:
    """`scale` padded with ones to `[rows, cols]`."""
    return F.pad(scale, (0, cols - scale.shape[1], 0, rows - scale.shape[0]), value=1.0)


def _crop(y: Tensor, rows: int, cols: int) -> Tensor:
    return y.narrow(0, 0, rows).narrow(1, 0, cols)


def _scaled_mm_cpu(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    scale_a, scale_b = _matching_scales(a, b)
    # Inductor requires both operands to be contiguous along the contraction.
    data_a, data_b = (materialize(q.data.contiguous()) for q in (a, b))
    return torch._scaled_mm(data_a, data_b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype)


def _matching_scales(a: Quantized, b: Quantized) -> tuple[Tensor, Tensor]:
    """Scales as `_scaled_mm` takes them: both of one element, or `[M, 1]` and `[1, N]`."""
    if a.scale.numel() == b.scale.numel() == 1:
        return a.scale.reshape(()), b.scale.reshape(())
    rows_a, rows_b = a.data.shape[0], b.data.shape[0]
    return a.scale.expand(rows_a, 1).contiguous(), b.scale.expand(rows_b, 1).contiguous().t()


def _scaled_mm_cuda(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    rows_a, rows_b = a.data.shape[0], b.data.shape[0]
    data_a, data_b = _pad(a.data, 1, 16), _pad(b.data, 16, 16)
    scale_a, scale_b = _matching_scales(a, Quantized(data_b, _pad_rows_of(b.scale, data_b.shape[0])))
    after = None
    if scale_a.dim() == 2 and out_dtype != torch.bfloat16:
        # The rowwise kernels write bfloat16 only. A product with unit scales writes float32, scaled here.
        after = scale_a * scale_b.narrow(1, 0, rows_b)
        scale_a = scale_b = scale_a.new_ones(())
    y = torch._scaled_mm(
        data_a,
        data_b.t(),
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=out_dtype if after is None else torch.float32,
        use_fast_accum=gemm.fast_accum,
    )
    y = _crop(y, rows_a, rows_b)
    return y if after is None else (y * after).to(out_dtype)


def _pad_rows_of(scale: Tensor, rows: int) -> Tensor:
    return scale if scale.shape[0] == 1 else _pad_scale(scale, rows, 1)


_OPERATORS = torch.library.Library("octavo", "FRAGMENT")
_OPERATORS.define(
    "scaled_mm_blocks(Tensor a, Tensor b, Tensor scale_a, int kind_a, Tensor scale_b, int kind_b, "
    "int swizzle, ScalarType out_dtype, bool fast_accum) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_OPERATORS, "scaled_mm_blocks", "CompositeExplicitAutograd")
def _scaled_mm_blocks(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    kind_a: int,
    scale_b: Tensor,
    kind_b: int,
    swizzle: int,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    """`F.scaled_mm` as one operator that the compiler does not look into.

    Compiled, `F.scaled_mm` itself cannot be traced by PyTorch 2.11; 2.13 lowers it to `_scaled_mm`, which
    refuses scales padded as cuBLAS wants them, and the swizzled ones of 32-blocks.
    """
    return F.scaled_mm(
        a,
        b,
        scale_a,
        F.ScalingType(kind_a),
        scale_b,
        F.ScalingType(kind_b),
        swizzle_a=F.SwizzleType(swizzle),
        swizzle_b=F.SwizzleType(swizzle),
        output_dtype=out_dtype,
        use_fast_accum=fast_accum,
    )


# The fake is the call itself, which checks sizes, strides and scales.
torch.library.register_fake("octavo::scaled_mm_blocks", _scaled_mm_blocks, lib=_OPERATORS)


def _block_mm_cuda(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    rows_a, rows_b = a.data.shape[0], b.data.shape[0]
    assert gemm.b is not None
    square = gemm.b.square
    data_a, data_b = _pad(a.data, 16, 128), _pad(b.data, 128 if square else 16, 128)
    blocks = data_a.shape[1] // 128
    scale_a = _pad_scale(a.scale, data_a.shape[0], blocks).t().contiguous().t()
    if square:  # cuBLAS reads these in columns of a multiple of 4
        scale_b = _pad_scale(b.scale, data_b.shape[0] // 128, -(-blocks // 4) * 4).contiguous().t()
    else:
        scale_b = _pad_scale(b.scale, data_b.shape[0], blocks).t().contiguous().t()
    kind_b = F.ScalingType.BlockWise128x128 if square else F.ScalingType.BlockWise1x128
    y = torch.ops.octavo.scaled_mm_blocks(
        data_a,
        data_b.t(),
        scale_a,
        F.ScalingType.BlockWise1x128.value,
        scale_b,
        kind_b.value,
        F.SwizzleType.NO_SWIZZLE.value,
        torch.bfloat16 if out_dtype == torch.float16 else out_dtype,
        gemm.fast_accum,
    )
    return _crop(y, rows_a, rows_b).to(out_dtype)


def swizzle_e8m0(scale: Tensor) -> Tensor:
    """One-byte scales (codes `[rows, blocks]`) in the order in which Blackwell's units read them, flat.

    The grid is cut into tiles of 128 x 4, padded with the code of 1.0; within a tile, rows 32 apart are
    adjacent.
    """
    rows, cols = scale.shape
    codes = F.pad(scale, (0, -cols % 4, 0, -rows % 128), value=127)
    # row tile, row / 32, row % 32, column tile, column
    tiles = codes.unflatten(0, (-1, 4, 32)).unflatten(3, (-1, 4))
    return tiles.permute(0, 3, 2, 1, 4).contiguous().flatten().view(torch.float8_e8m0fnu)


def _mx_mm_cuda(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    rows_a, rows_b = a.data.shape[0], b.data.shape[0]
    y = torch.ops.octavo.scaled_mm_blocks(
        _pad(a.data, 16, 32),
        _pad(b.data, 16, 32).t(),
        swizzle_e8m0(a.scale),
        F.ScalingType.BlockWise1x32.value,
        swizzle_e8m0(b.scale),
        F.ScalingType.BlockWise1x32.value,
        F.SwizzleType.SWIZZLE_32_4_4.value,
        torch.bfloat16 if out_dtype == torch.float16 else out_dtype,
        False,
    )
    return _crop(y, rows_a, rows_b).to(out_dtype)


# -------------------------------------------------------------------------------------------- the backends

_TENSOR, _ROW, _LINE, _TILE, _MX = (FULL, FULL), (1, FULL), (1, 128), (128, 128), (1, 32)


class Device(NamedTuple):
    """What decides whether a backend supports a device; versions are (0, 0) without an NVIDIA GPU."""

    type: str
    capability: tuple[int, int] = (0, 0)
    cuda: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class GemmBackend:
    """A way to multiply on a type of device.

    `blocks`: the pairs (a, b) of blocks it multiplies. `run` computes `a . b^T` for operands of any size and
    layout. `capability`, `cuda`, `version`: the least compute capability, CUDA and PyTorch it needs.
    """

    name: str
    device: str
    blocks: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    run: Callable[[Quantized, Quantized, Gemm, torch.dtype], Tensor]
    capability: tuple[int, int] = (0, 0)
    cuda: tuple[int, int] = (0, 0)
    version: tuple[int, int] = (0, 0)
    one_byte_scales: bool = False

    def multiplies(self, gemm: Gemm) -> bool:
        if gemm.a is None or gemm.b is None or (gemm.a.block, gemm.b.block) not in self.blocks:
            return False
        return all(cast.scale.one_byte == self.one_byte_scales for cast in (gemm.a, gemm.b))

    def supports(self, device: Device) -> bool:
        return (
            device.type == self.device
            and device.capability >= self.capability
            and device.cuda >= self.cuda
            and self.version <= _TORCH
        )


_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_PER_TENSOR = ((_TENSOR, _TENSOR),)
_PER_ROW = ((_ROW, _ROW), (_ROW, _TENSOR), (_TENSOR, _ROW))
GEMM_BACKENDS: tuple[GemmBackend, ...] = (
    GemmBackend("torch._scaled_mm", "cpu", _PER_TENSOR, _scaled_mm_cpu),
    GemmBackend(
        "torch._scaled_mm", "cpu", _PER_ROW, _scaled_mm_cpu, version=(2, 13)
    ),  # 2.11 has no such kernel
    GemmBackend(
        "torch._scaled_mm, one scale per tensor", "cuda", _PER_TENSOR, _scaled_mm_cuda, capability=(8, 9)
    ),
    GemmBackend("torch._scaled_mm, one scale per row", "cuda", _PER_ROW, _scaled_mm_cuda, capability=(9, 0)),
    GemmBackend(
        "scaled_mm, 128-blocks",
        "cuda",
        ((_LINE, _TILE), (_LINE, _LINE)),
        _block_mm_cuda,
        capability=(9, 0),
        cuda=(12, 9),
    ),
    GemmBackend(
        "scaled_mm, 32-blocks",
        "cuda",
        ((_MX, _MX),),
        _mx_mm_cuda,
        capability=(10, 0),
        cuda=(12, 8),
        one_byte_scales=True,
    ),
)


# (0, 0) on ROCm, whose float8 formats differ: it has no backend.
_CUDA = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])


def describe_device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(device.type)
    properties = torch.cuda.get_device_properties(device)  # a constant to the compiler
    return Device("cuda", (properties.major, properties.minor), (_CUDA[0], _CUDA[1]))


def find_backend(gemm: Gemm, device: Device) -> GemmBackend | None:
    """The hardware backend for `gemm` on `device`, or None."""
    return next(
        (backend for backend in GEMM_BACKENDS if backend.multiplies(gemm) and backend.supports(device)), None
    )


def _missing(gemm: Gemm, device: Device) -> str:
    """Why `device` has no backend for `gemm`."""
    on_device = [
        backend for backend in GEMM_BACKENDS if backend.multiplies(gemm) and backend.device == device.type
    ]
    if not on_device:
        assert gemm.a is not None
        assert gemm.b is not None
        return f"no {device.type} backend multiplies {gemm.a.blocks} by {gemm.b.blocks}"
    backend = on_device[0]
    if backend.version > _TORCH:
        least = _dotted(backend.version)
        return f"{backend.name} needs PyTorch {least} on a {backend.device}; here is {torch.__version__}"
    needs = f"{backend.name} needs compute capability {_dotted(backend.capability)}"
    if any(backend.cuda):
        needs += f" and CUDA {_dotted(backend.cuda)}"
    return f"{needs}; here are {_dotted(device.capability)} and CUDA {_dotted(device.cuda)}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def choose_backend(gemm: Gemm, device: torch.device, emulate: bool | None) -> GemmBackend | None:
    """The backend that computes `gemm` on `device`; None means emulation.

    `emulate`: True always emulates. False never does, and raises ValueError if the device has no backend.
    None takes the faster: hardware if there is a backend, except on a CPU (see the module's docstring).
    """
    if emulate or (emulate is None and device.type != "cuda"):
        return None
    kind = describe_device(device)
    backend = find_backend(gemm, kind)
    if backend is None and emulate is False:
        raise ValueError(
            f"emulate=False, but {_missing(gemm, kind)}. Leave emulate=None to emulate where there is no "
            "hardware, or choose a recipe that this device runs"
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
        dict.fromkeys(_missing(g, kind) for g in gemms.values() if find_backend(g, kind) is None)
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
    unsupported = [gemm for gemm in recipe.gemms.values() if gemm.float8 and find_backend(gemm, kind) is None]
    if not unsupported:
        return
    if emulate is False:
        choose_backend(unsupported[0], device, emulate)
    if (recipe.name, device.type) not in _warned:
        _warned.add((recipe.name, device.type))
        warnings.warn(
            f"recipe {recipe.name!r} runs in emulation: {_missing(unsupported[0], kind)}. The results are "
            "those of hardware, but slow; Float8LinearConfig(emulate=True) requests that and silences this",
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


_OPERATORS.define(
    "mm_codes(Tensor a, Tensor b, ScalarType out_dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl(_OPERATORS, "mm_codes", "CompositeExplicitAutograd")
def _mm_codes(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`a[M, C] . b[C, N]` of float32 tensors whose values are exact in bfloat16; added in float32, rounded
    once.

    Allowing oneDNN bfloat16 makes it use AMX; without AMX, oneDNN's float32 is 1.15 times as fast as torch's
    default on a Zen 4. This is an operator so that compiled code, too, changes the setting only around the
    product: the setting is global to the process, and would round every other product.
    """
    if not BFLOAT16_UNITS or a.device.type != "cpu":
        return _mm(a, b).to(out_dtype)
    if out_dtype == torch.bfloat16:
        return _mm(a.bfloat16(), b.bfloat16())
    mkldnn: Any = torch.backends.mkldnn
    units = mkldnn.matmul
    with _precision_lock:
        before = units.fp32_precision
        units.fp32_precision = "bf16"
        try:
            return _mm(a, b).to(out_dtype)
        finally:
            units.fp32_precision = before


@torch.library.register_fake("octavo::mm_codes", lib=_OPERATORS)
def _(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
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
    y = torch.ops.octavo.mm_codes(values_a, values_b.t(), torch.float32 if scales else out_dtype)
    if len(scales) == 2 and scales[0].numel() == scales[1].numel() == 1:
        scales = [scales[0] * scales[1]]  # one pass over y
    for scale in scales:
        y.mul_(scale)
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
