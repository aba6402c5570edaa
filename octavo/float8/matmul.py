"""`y[M, N] = a[M, C] . b[N, C]^T` for float8 operands: the hardware's units where there are any, else
emulation.

Emulation multiplies the dequantised operands in float32. That is exactly what float8 hardware computes, up to
the order in which it adds, so it honours the recipe on any device. Hardware paths are rows of `PATHS`: which
blocks a path multiplies, on which devices, and the call. Adding a backend is adding a row.

On a CPU both exist: `torch._scaled_mm` runs there and equals emulation bit for bit. It converts operands one
element at a time, so emulation, which looks codes up (eager) or fuses the conversion (compiled), is what
`emulate=None` takes.

Hopper wants both operands contiguous along the contraction, and multiples of 16 (128 for block scales);
operands are padded with zeros here, where they are one byte an element, and nowhere else. Zeros add nothing
to a product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.float8.quantize import Quantized, dequantize
from octavo.float8.recipe import FULL, Cast, Gemm, Recipe


class EmulationWarning(UserWarning):
    """float8 runs in emulation because the device has no float8 units for the recipe. Shown once a recipe and
    device.
    """


# --------------------------------------------------------------------------------------- the hardware's calls


def _pad(data: Tensor, rows: int, cols: int) -> Tensor:
    """`data` as row-major float8, zeros appended until its sizes are multiples of `rows` and `cols`."""
    pad_rows, pad_cols = -data.shape[0] % rows, -data.shape[1] % cols
    if pad_rows or pad_cols:  # through uint8, since float8 has no fill
        data = F.pad(data.view(torch.uint8), (0, pad_cols, 0, pad_rows)).view(data.dtype)
    return data.contiguous()


def _pad_scale(scale: Tensor, rows: int, cols: int) -> Tensor:
    """`scale` with ones appended up to `[rows, cols]`."""
    return F.pad(scale, (0, cols - scale.shape[1], 0, rows - scale.shape[0]), value=1.0)


def _crop(y: Tensor, rows: int, cols: int) -> Tensor:
    return y.narrow(0, 0, rows).narrow(1, 0, cols)


def _scaled_mm_cpu(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    scale_a, scale_b = _matching_scales(a, b)
    return torch._scaled_mm(a.data, b.data.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype)


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
        # The rowwise kernels write bfloat16 only. A product with unit scales writes float32, scaled
        # afterwards.
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
    y = F.scaled_mm(
        data_a,
        data_b.t(),
        scale_a,
        F.ScalingType.BlockWise1x128,
        scale_b,
        F.ScalingType.BlockWise128x128 if square else F.ScalingType.BlockWise1x128,
        output_dtype=torch.bfloat16 if out_dtype == torch.float16 else out_dtype,
        use_fast_accum=gemm.fast_accum,
    )
    return _crop(y, rows_a, rows_b).to(out_dtype)


def swizzle_e8m0(scale: Tensor) -> Tensor:
    """One-byte scales (codes `[rows, blocks]`) in the order Blackwell's units read them, flat.

    The grid is cut into tiles of 128 x 4 (padded with the code of 1.0); within a tile, rows 32 apart lie
    together.
    """
    rows, cols = scale.shape
    codes = F.pad(scale, (0, -cols % 4, 0, -rows % 128), value=127)
    # row tile, row / 32, row % 32, column tile, column
    tiles = codes.unflatten(0, (-1, 4, 32)).unflatten(3, (-1, 4))
    return tiles.permute(0, 3, 2, 1, 4).contiguous().flatten().view(torch.float8_e8m0fnu)


def _mx_mm_cuda(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    rows_a, rows_b = a.data.shape[0], b.data.shape[0]
    y = F.scaled_mm(
        _pad(a.data, 16, 32),
        _pad(b.data, 16, 32).t(),
        swizzle_e8m0(a.scale),
        F.ScalingType.BlockWise1x32,
        swizzle_e8m0(b.scale),
        F.ScalingType.BlockWise1x32,
        swizzle_a=F.SwizzleType.SWIZZLE_32_4_4,
        swizzle_b=F.SwizzleType.SWIZZLE_32_4_4,
        output_dtype=torch.bfloat16 if out_dtype == torch.float16 else out_dtype,
    )
    return _crop(y, rows_a, rows_b).to(out_dtype)


# ----------------------------------------------------------------------------------------- the table of paths

_TENSOR, _ROW, _LINE, _TILE, _MX = (FULL, FULL), (1, FULL), (1, 128), (128, 128), (1, 32)


class Device(NamedTuple):
    """What decides whether a path serves a device. `capability` and `cuda` are (0, 0) without an NVIDIA
    GPU.
    """

    type: str
    capability: tuple[int, int] = (0, 0)
    cuda: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Path:
    """A way to multiply on a device: `blocks` lists the (a, b) blocks, `capability` the least GPU, `cuda` and
    `version` the least versions of CUDA and PyTorch. `run` computes `a . b^T`, given operands of any size and
    layout.
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

    def serves(self, device: Device) -> bool:
        # Block scales exist on one generation of GPUs only where the next has another unit for them.
        return (
            device.type == self.device
            and device.capability >= self.capability
            and device.cuda >= self.cuda
            and self.version <= _TORCH
        )


_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_PER_TENSOR = ((_TENSOR, _TENSOR),)
_PER_ROW = ((_ROW, _ROW), (_ROW, _TENSOR), (_TENSOR, _ROW))
PATHS: tuple[Path, ...] = (
    Path("torch._scaled_mm", "cpu", _PER_TENSOR, _scaled_mm_cpu),
    Path("torch._scaled_mm", "cpu", _PER_ROW, _scaled_mm_cpu, version=(2, 13)),  # 2.11 has no such kernel
    Path("torch._scaled_mm, one scale a tensor", "cuda", _PER_TENSOR, _scaled_mm_cuda, capability=(8, 9)),
    Path("torch._scaled_mm, one scale a row", "cuda", _PER_ROW, _scaled_mm_cuda, capability=(9, 0)),
    Path(
        "scaled_mm, 128-blocks",
        "cuda",
        ((_LINE, _TILE), (_LINE, _LINE)),
        _block_mm_cuda,
        capability=(9, 0),
        cuda=(12, 9),
    ),
    Path(
        "scaled_mm, 32-blocks",
        "cuda",
        ((_MX, _MX),),
        _mx_mm_cuda,
        capability=(10, 0),
        cuda=(12, 8),
        one_byte_scales=True,
    ),
)


# (0, 0) on ROCm, whose float8 has other formats: it gets no path.
_CUDA = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])


def describe_device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(device.type)
    properties = torch.cuda.get_device_properties(device)  # a constant to the compiler
    return Device("cuda", (properties.major, properties.minor), (_CUDA[0], _CUDA[1]))


def find_path(gemm: Gemm, device: Device) -> Path | None:
    """The hardware path for `gemm` on `device`, or None."""
    return next((path for path in PATHS if path.multiplies(gemm) and path.serves(device)), None)


def _missing(gemm: Gemm, device: Device) -> str:
    """Why `device` has no path for `gemm`."""
    on_device = [path for path in PATHS if path.multiplies(gemm) and path.device == device.type]
    if not on_device:
        assert gemm.a is not None
        assert gemm.b is not None
        return f"no {device.type} path multiplies {gemm.a.blocks} by {gemm.b.blocks}"
    path = on_device[0]
    if path.version > _TORCH:
        least = _dotted(path.version)
        return f"{path.name} needs PyTorch {least} on a {path.device}; here is {torch.__version__}"
    needs = f"{path.name} needs compute capability {_dotted(path.capability)}"
    if any(path.cuda):
        needs += f" and CUDA {_dotted(path.cuda)}"
    return f"{needs}; here are {_dotted(device.capability)} and CUDA {_dotted(device.cuda)}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def choose_path(gemm: Gemm, device: torch.device, emulate: bool | None) -> Path | None:
    """The path that computes `gemm` on `device`; None is emulation.

    `emulate`: True always emulates, False never does (ValueError where the device has no path), None takes
    the faster: hardware wherever there is some, except on a CPU (see the module's docstring).
    """
    if emulate or (emulate is None and device.type != "cuda"):
        return None
    what = describe_device(device)
    path = find_path(gemm, what)
    if path is None and emulate is False:
        raise ValueError(
            f"emulate=False, but {_missing(gemm, what)}. Leave emulate=None to emulate where there is no "
            "hardware, or choose a recipe that this device runs"
        )
    return path


def describe_path(recipe: Recipe, device: torch.device, emulate: bool | None) -> str:
    """One line on what `recipe` does on `device` and why: "hardware: ..." or "emulated: ...".

    Raises the ValueError that training would, where `emulate=False` asks for what `device` lacks.
    """
    gemms = {name: gemm for name, gemm in recipe.gemms.items() if gemm.float8}
    if emulate:
        return "emulated: as asked for (emulate=True)"
    chosen = {name: choose_path(gemm, device, emulate) for name, gemm in gemms.items()}
    hardware = ", ".join(dict.fromkeys(path.name for path in chosen.values() if path is not None))
    what = describe_device(device)
    missing = "; ".join(
        dict.fromkeys(_missing(g, what) for g in gemms.values() if find_path(g, what) is None)
    )
    if not any(chosen.values()):
        if missing:
            return f"emulated: {missing}"
        return (
            "emulated: a CPU multiplies dequantised float32 faster than torch._scaled_mm, with the same bits"
        )
    if missing:
        return f"hardware: {hardware}; the rest emulated: {missing}"
    return f"hardware: {hardware}"


_warned: set[tuple[str, str]] = set()


def warn_if_emulated(recipe: Recipe, device: torch.device, emulate: bool | None) -> None:
    """Warn, once a recipe and kind of device, where `emulate=None` has to emulate for want of hardware.

    Raises ValueError where `emulate=False` cannot be had.
    """
    if emulate or device.type == "meta":
        return
    what = describe_device(device)
    lacking = [gemm for gemm in recipe.gemms.values() if gemm.float8 and find_path(gemm, what) is None]
    if not lacking:
        return
    if emulate is False:
        choose_path(lacking[0], device, emulate)
    if (recipe.name, device.type) not in _warned:
        _warned.add((recipe.name, device.type))
        warnings.warn(
            f"recipe {recipe.name!r} runs in emulation: {_missing(lacking[0], what)}. It computes "
            "what hardware would, slowly; Float8LinearConfig(emulate=True) asks for that and silences this",
            EmulationWarning,
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------------ the product


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """`a . b^T` in the operands' own dtype: autocast must not narrow a product whose precision the recipe
    sets.
    """
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return torch.mm(a, b.t())
    return torch.mm(a, b.t())


def _emulate(a: Quantized, b: Quantized, cast_a: Cast, cast_b: Cast, out_dtype: torch.dtype) -> Tensor:
    values_a, values_b = dequantize(a, cast_a.block), dequantize(b, cast_b.block)
    if not torch.compiler.is_compiling() and any(n % 16 for n in (*values_a.shape, values_b.shape[0])):
        # Libraries then add in an order that depends on the operands' layout: this is `torch._scaled_mm`'s.
        # Not in compiled code, which would write transposed: garbage from narrow types on a CPU.
        values_a, values_b = values_a.contiguous(), values_b.t().contiguous().t()
    return _mm(values_a, values_b).to(out_dtype)


def matmul(
    a: Quantized | Tensor,
    b: Quantized | Tensor,
    gemm: Gemm,
    out_dtype: torch.dtype,
    *,
    emulate: bool | None = None,
) -> Tensor:
    """`a[M, C] . b[N, C]^T` as `y[M, N]` in `out_dtype`; operands as `gemm` casts them.

    `emulate` as in `choose_path`. Any size works, zero included. Raises ValueError where `emulate=False`
    cannot be had, or where the operands' contractions differ.
    """
    data_a, data_b = (x.data if isinstance(x, Quantized) else x for x in (a, b))
    if data_a.shape[1] != data_b.shape[1]:
        raise ValueError(
            f"operands [rows, contraction] {tuple(data_a.shape)} and {tuple(data_b.shape)} differ in it"
        )
    if gemm.a is None or gemm.b is None:
        return _mm(data_a, data_b).to(out_dtype)
    assert isinstance(a, Quantized)
    assert isinstance(b, Quantized)
    path = choose_path(gemm, data_a.device, emulate)
    if 0 in data_a.shape or 0 in data_b.shape:
        return torch.zeros(data_a.shape[0], data_b.shape[0], dtype=out_dtype, device=data_a.device)
    if path is None:
        return _emulate(a, b, gemm.a, gemm.b, out_dtype)
    return path.run(a, b, gemm, out_dtype)
