"""Device functions that every kernel shares: magnitudes, scales, and the conversion to float8 and back.

They repeat `octavo/float8/quantize.py` bit for bit. Three choices make that possible on both a GPU and under
Triton's interpreter:

- A maximum of magnitudes is taken over their bits, as integers. Those of non-negative floats are ordered as
  the floats are, with NaN above infinity, so an integer maximum lets NaN win. Floating-point maxima drop NaN
  unless told otherwise, and told otherwise some compilers write garbage beside one-byte transposed stores
  (triton-lang/triton#11111).
- s is `div_rn(largest, amax)`: the correctly rounded float32 quotient, which is what float64 arithmetic
  rounded to float32 gives. GPU division is otherwise allowed to be an ulp off.
- The conversion is the hardware's `cvt.rn.satfinite`. The interpreter's own conversion is wrong (it loses the
  carry out of the mantissa, and misrounds subnormal numbers), so there the same rounding is done on bits. It
  also misreads bfloat16's subnormal numbers.

Numbers in place of names, since kernels know no recipe: `MANTISSA` is a format's mantissa bits, 3 for
float8_e4m3fn and 2 for float8_e5m2; `SCALES` says which numbers a scale may be, see `SCALE_FORMATS`.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# What triton.jit itself looks at when it meets a kernel.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRET = tl.constexpr(INTERPRETING)

ONE_BYTE = tl.constexpr(2)  # from here on scales are one-byte codes
EPS = tl.constexpr(1e-12)


@triton.jit
def to_float32(x):
    """bfloat16, float16 or float32 as float32: exact."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as bfloat16, float16 or float32: nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        near = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (near >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def magnitude(x):
    """Bits of |x| for float32 x, as int32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales_of(amax, MANTISSA: tl.constexpr, SCALES: tl.constexpr):
    """`(s, scale)` for maxima given as bits: what elements are multiplied by, and what gives them back."""
    if SCALES >= ONE_BYTE:
        exponent = (amax >> 23) - (8 if MANTISSA == 3 else 15)
        if SCALES == 2:
            exponent += tl.where((amax & 0x007FFFFF) > 0x00600000, 1, 0)
        exponent = tl.where(exponent < 0, 0, exponent)
        broken = amax >= 0x7F800000
        scale = tl.where(broken, 255, exponent).to(tl.uint8)
        s = tl.where(broken, 0x7FC00000, (254 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        largest = amax.to(tl.float32, bitcast=True)
        largest = tl.where(largest < EPS, EPS, largest)  # NaN stays
        s = tl.div_rn(448.0 if MANTISSA == 3 else 57344.0, largest)
        if SCALES == 1:
            power = (s.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            s = tl.where(s != s, s, power)
        scale = tl.div_rn(1.0, s)
    return s, scale


@triton.jit
def to_float8(x, MANTISSA: tl.constexpr):
    """float32 as the bits of float8, uint8: nearest, ties to even; saturates; NaN is NaN."""
    if INTERPRET:
        largest = 448.0 if MANTISSA == 3 else 57344.0
        x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
        bits = x.to(tl.int32, bitcast=True)
        a = bits & 0x7FFFFFFF
        # Half of what is dropped, less one, plus the bit that stays: ties to even. Exponents lose 127 - bias.
        dropped = 23 - MANTISSA
        shift = 120 if MANTISSA == 3 else 112
        normal = ((a + (1 << (dropped - 1)) - 1 + ((a >> dropped) & 1)) >> dropped) - (shift << MANTISSA)
        # Below the normal numbers: adding a float whose last bit is worth the least float8 rounds to it.
        least = 0x46800000 if MANTISSA == 3 else 0x43000000
        subnormal = (a.to(tl.float32, bitcast=True) + (16384.0 if MANTISSA == 3 else 128.0)).to(
            tl.int32, bitcast=True
        ) - least
        code = tl.where(a < ((shift + 1) << 23), subnormal, normal) | ((bits >> 24) & 0x80)
        return tl.where(a > 0x7F800000, 0x7F, code).to(tl.uint8)
    if MANTISSA == 3:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
