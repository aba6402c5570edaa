"""Casting to float8: the reference implementation, in plain PyTorch.

float8 has 4 or 5 exponent bits, so a tensor must first be scaled into its range. For each block of elements:

    amax  = max |x|
    s     = dtype_max / max(amax, 1e-12)     in float64, rounded to float32; down to a power of two if asked
    data  = float8(clamp(x * s))             the product in float32; round to nearest, ties to even
    scale = 1 / s                            so that data * scale approximates x

The float64 step makes s equal on every device: float32 division is not correctly rounded everywhere, and one
ulp in s moves values across rounding boundaries. Powers of two are extracted from the bits, since log2
misrounds just below a power of two. NaN stays NaN, and an infinity turns its whole block into NaN (its amax
is infinite, so s is 0), so that neither becomes a finite number.

This code runs eagerly, or is fused by the compiler. On a GPU, Triton kernels (`casts/gpu_cast.py`) replace it
and match it bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.float8.casts import gpu_cast
from octavo.float8.distributed.tp_scales import ShardedAxis
from octavo.float8.recipe import FULL, Cast, ScaleFormat

EPS = 1e-12
"""The smallest amax, so that an all-zero block has a finite scale."""

_EXPONENT_MASK = 0x7F800000
_MANTISSA_MASK = 0x007FFFFF
_LARGEST_WITHOUT_CARRY = 0x00600000  # the mantissa of 1.75, which is that of both formats' largest number
_E8M0_NAN = 255
_FLOAT32_NAN = 0x7FC00000


class Quantized(NamedTuple):
    """A float8 operand: `data[rows, contraction]` and `scale[row blocks, column blocks]`.

    `dequantize` gives the values. `scale` holds float32 numbers or, in the E8M0 formats, one-byte codes as
    uint8, because the compiler does not support torch.float8_e8m0fnu on a CPU; `scale_values` gives the
    numbers.
    """

    data: Tensor
    scale: Tensor


Casts = tuple[Quantized | None, Quantized | None]
"""A tensor's cast as an operand, and its transpose's; None for one that is not cast."""


def block_size(block: tuple[int, int], shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """`block` with FULL replaced by the extent of `shape` (at least 1)."""
    rows, cols = (max(n, 1) if b == FULL else b for b, n in zip(block, shape, strict=True))
    return rows, cols


def _tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """`x[R, C]` as `[R / r, r, C / c, c]`: a view if the block divides the shape, else zero-padded."""
    rows, cols = block_size(block, x.shape)
    pad_rows, pad_cols = -x.shape[0] % rows, -x.shape[1] % cols
    if pad_rows or pad_cols:
        x = F.pad(x, (0, pad_cols, 0, pad_rows))
    return x.unflatten(0, (x.shape[0] // rows, rows)).unflatten(2, (x.shape[1] // cols, cols))


def _untile(tiles: Tensor, shape: torch.Size) -> Tensor:
    flat = tiles.flatten(2, 3).flatten(0, 1)
    return flat.narrow(0, 0, shape[0]).narrow(1, 0, shape[1])


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude per block of `x[R, C]`: `[ceil(R / r), ceil(C / c)]` in x's dtype. NaN wins."""
    if x.numel() == 0:
        rows, cols = block_size(block, x.shape)
        return x.new_zeros(-(-x.shape[0] // rows), -(-x.shape[1] // cols))
    if not torch.compiler.is_compiling():
        # Without abs().amax()'s temporary of x's size, in half the time.
        if block == (FULL, FULL):
            low, high = torch.aminmax(x)
            return torch.maximum(high, -low).abs().reshape(1, 1)
        if x.device.type == "cpu" and x.dtype == torch.float32 and block in ((1, FULL), (FULL, 1)):
            dim = block.index(FULL)
            return torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True)).abs()
    return _tiles(x, block).abs().amax(dim=(1, 3))


def _keep_nan(x: Tensor, result: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, result)


def scales_from_amax(amax: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """`(s, scale)` of each block: the multiplier of its elements, and its inverse.

    `amax` has any float dtype and shape. s is float32 of that shape; scale is float32 or, in E8M0, uint8
    codes.
    """
    if cast.scale.one_byte:
        return _e8m0_scales(amax.float(), cast)
    if not cast.scaled:
        ones = torch.ones_like(amax, dtype=torch.float32)
        return ones, ones
    s = (torch.finfo(cast.dtype).max / amax.double().clamp(min=EPS)).float()
    if cast.scale is ScaleFormat.POW2:
        s = _keep_nan(s, (s.view(torch.int32) & _EXPONENT_MASK).view(torch.float32))
    if s.device.type == "cpu":
        # Not via float64: code compiled for AVX2 does not round s in `.float().double()`.
        scale = s.reciprocal()
    else:
        # The correctly rounded float32 quotient, which float32 division on a GPU need not be.
        scale = (1.0 / s.double()).float()
    return materialize(s), materialize(scale)


def materialize(x: Tensor) -> Tensor:
    """`x`; code compiled for a CPU writes it to memory instead of recomputing it at each use.

    Otherwise the compiler moves the arithmetic of a column's scale into the loop over its elements, and
    recomputes the tensor being cast in each pass: two maxima, two casts. `as_strided` needs x in memory.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.as_strided(x.shape, x.stride())
    return x


def scale_values(scale: Tensor) -> Tensor:
    """A `Quantized.scale` as float32 numbers: E8M0 codes e become 2**(e - 127), and 255 NaN."""
    if scale.dtype != torch.uint8:
        return scale
    code = scale.int()
    bits = torch.where(code == 0, 0x00400000, code << 23)  # 2**-127 is subnormal in float32
    return torch.where(code == _E8M0_NAN, torch.nan, bits.view(torch.float32))


def _e8m0_scales(amax: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    bits = amax.view(torch.int32)
    # dtype_max is 1.75 * 2**emax. This exponent maps amax into the format's top binade ...
    emax = 8 if cast.dtype == torch.float8_e4m3fn else 15
    exponent = ((bits & _EXPONENT_MASK) >> 23) - emax
    if cast.scale is ScaleFormat.E8M0:
        # ... and this adds one if amax would then exceed 1.75 * 2**emax.
        exponent = exponent + ((bits & _MANTISSA_MASK) > _LARGEST_WITHOUT_CARRY).int()
    exponent = exponent.clamp(min=0)  # biased by 127
    # In integers: a scalar NaN would be a tensor of its own, and the compiler could not merge equal casts.
    infinite = ((bits & _EXPONENT_MASK) == _EXPONENT_MASK).int()
    scale = (exponent + infinite * (_E8M0_NAN - exponent)).to(torch.uint8)
    s = (((254 - exponent) << 23) | (infinite * _FLOAT32_NAN)).view(torch.float32)
    return s, scale


def cast_data(x: Tensor, s: Tensor, cast: Cast) -> Tensor:
    """`x[R, C]` multiplied by its blocks' `s[R / r, C / c]`, as float8. Keeps x's memory layout."""
    limit = torch.finfo(cast.dtype).max
    scaled = _tiles(x, cast.block).float() * s.unsqueeze(1).unsqueeze(3)
    # Older versions of torch do not saturate when they cast in eager mode.
    return _untile(scaled.clamp_(-limit, limit).to(cast.dtype), x.shape)


def quantize_with_amax(x: Tensor, amax: Tensor, cast: Cast) -> Quantized:
    """Cast `x[R, C]` with the scales of given maxima `amax[R / r, C / c]`, which may be smaller than x's own.

    Larger elements saturate. Non-finite elements become NaN; clamping would turn an infinity into a number.
    """
    s, scale = scales_from_amax(amax, cast)
    limit = torch.finfo(cast.dtype).max
    scaled = (_tiles(x, cast.block).float() * s.unsqueeze(1).unsqueeze(3)).clamp(-limit, limit)
    codes = torch.where(_tiles(x, cast.block).isfinite(), scaled, torch.nan).to(cast.dtype)
    return Quantized(_untile(codes, x.shape), scale)


def _is_transposed(x: Tensor) -> bool:
    return not x.is_contiguous() and x.t().is_contiguous()


def quantize(x: Tensor, cast: Cast, sharded: ShardedAxis | None = None) -> Quantized:
    """Cast `x[rows, contraction]` (bfloat16, float16 or float32).

    Keeps x's memory layout, except that a kernel's result is contiguous, as hardware needs it. `sharded`: x
    is one rank's shard of the operand, and the scales are those of the whole operand.
    """
    if gpu_cast.supports(x, cast, sharded):
        if _is_transposed(x):
            _, made = gpu_cast.cast_both(x.t(), None, cast)
        else:
            made, _ = gpu_cast.cast_both(x, cast, None)
        assert made is not None
        return Quantized(*made)
    if _is_transposed(x):
        # Cast x.t(), which is contiguous. Compiled code would otherwise write transposed: slowly, and from
        # bfloat16 on a CPU incorrectly.
        along = replace(cast, block=(cast.block[1], cast.block[0]))
        amax = block_amax(x.t(), along.block).t()
        s, scale = scales_from_amax(amax if sharded is None else sharded.reduce_amax(amax, cast), cast)
        return Quantized(cast_data(x.t(), s.t(), along).t(), scale)
    amax = block_amax(x, cast.block)
    s, scale = scales_from_amax(amax if sharded is None else sharded.reduce_amax(amax, cast), cast)
    return Quantized(cast_data(x, s, cast), scale)


def transposed(q: Quantized) -> Quantized:
    """The transpose, without copying. For a square cast this is the cast of the transpose."""
    return Quantized(q.data.t(), q.scale.t())


def quantize_both(
    x: Tensor, row: Cast | None, col: Cast | None, sharded: ShardedAxis | None = None
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """Cast `x[R, C]` as an operand that contracts C, and its transpose as one that contracts R.

    Both casts are made at once, so that x need not be kept. For a cast of None, x (or its transpose) is
    returned in high precision. Equal square casts are made once. `sharded`: how x is sharded over ranks.
    """
    across = sharded and sharded.transposed
    if (row or col) and gpu_cast.supports(x, row, sharded) and gpu_cast.supports(x, col, across):
        one, two = gpu_cast.cast_both(x, row, col)
        return x if one is None else Quantized(*one), x.t() if two is None else Quantized(*two)
    x = materialize(x)
    first = x if row is None else quantize(x, row, sharded)
    if col is None:
        return first, x.t()
    if col == row and col.square and isinstance(first, Quantized):
        return first, transposed(first)
    return first, quantize(x.t(), col, across)


def to_float32(data: Tensor) -> Tensor:
    """float8 `data` as float32, exactly. Keeps the memory layout."""
    if torch.compiler.is_compiling() or data.device.type != "cpu" or type(data) is not Tensor:
        return data.float()
    # PyTorch converts float8 one element at a time on a CPU, but float16 many at a time. Moving a code's bits
    # to their places in a float16 takes half as long for e4m3 and a third for e5m2.
    codes = data.view(torch.int8).to(torch.int16)
    if data.dtype == torch.float8_e5m2:  # the upper half of a float16
        return codes.bitwise_left_shift_(8).view(torch.float16).float()
    if data.numel() and (codes & 0x7F).amax() == 0x7F:  # NaN, which would become 480
        return data.float()
    # The exponent's bias is 7, and 15 in float16: multiply by 2**8. Of the extended sign, keep one bit.
    return codes.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float().mul_(256.0)


def dequantize(q: Quantized, block: tuple[int, int]) -> Tensor:
    """`data * scale` in float32, `[rows, contraction]`; `block` is that of the cast."""
    # Along memory, as in `quantize`. Not for square casts: the dequantized values would equal those of the
    # forward pass, and the compiler would save them, in float32, for backward.
    if _is_transposed(q.data) and block[0] != block[1]:
        return dequantize(transposed(q), (block[1], block[0])).t()
    values = _tiles(to_float32(q.data), block).mul_(scale_values(q.scale).unsqueeze(1).unsqueeze(3))
    return _untile(values, q.data.shape)
