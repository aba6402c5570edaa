"""Device functions that all kernels share: magnitudes, scales, and the conversion to float8.

They equal `octavo/float8/quantize.py` bit for bit, on a GPU and under Triton's interpreter, by three choices:

- A maximum of magnitudes is taken over their bits, as integers. The bits of non-negative floats have the
  floats' order, with NaN above infinity, so an integer maximum keeps NaN. Floating-point maxima drop NaN by
  default, and with the option to keep it some compilers write garbage beside one-byte transposed stores
  (triton-lang/triton#11111).
- s is `div_rn(largest, amax)`: the correctly rounded float32 quotient, which float64 arithmetic rounded to
  float32 also gives. Other GPU division may be an ulp off.
- The conversion is the hardware's `cvt.rn.satfinite`. The interpreter's conversion is wrong: it loses the
  carry out of the mantissa, misrounds subnormal numbers, and misreads bfloat16's subnormal numbers. So there
  the same rounding is done on bits.

Kernels take numbers instead of names: `MANTISSA` is the format's mantissa bits, 3 for float8_e4m3fn and 2 for
float8_e5m2; `SCALES` is the scale format, see `SCALE_FORMATS`.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The variable that triton.jit reads when it decorates a kernel.
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
