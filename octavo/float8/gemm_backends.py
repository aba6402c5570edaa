"""The hardware backends of float8 products: which blocks each multiplies, on which devices, and its call.

Each row of `GEMM_BACKENDS` is a backend; to add one, add a row. `matmul.py` chooses among them and emulation.

Hopper needs both operands contiguous along the contraction, with sizes that are multiples of 16 (128 for
block scales). Operands are zero-padded here, where they are one byte per element, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.float8.quantize import Quantized, materialize
from octavo.float8.recipe import FULL, Gemm


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


OPERATORS = torch.library.Library("octavo", "FRAGMENT")
OPERATORS.define(
    "scaled_mm_blocks(Tensor a, Tensor b, Tensor scale_a, int kind_a, Tensor scale_b, int kind_b, "
    "int swizzle, ScalarType out_dtype, bool fast_accum) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(OPERATORS, "scaled_mm_blocks", "CompositeExplicitAutograd")
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
torch.library.register_fake("octavo::scaled_mm_blocks", _scaled_mm_blocks, lib=OPERATORS)


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


def why_unsupported(gemm: Gemm, device: Device) -> str:
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
