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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What triton.jit itself looks at when it meets a kernel.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRET = tl.constexpr(INTERPRETING)

MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
SCALE_FORMATS = {"fp32": 0, "pow2": 1, "e8m0": 2, "e8m0_floor": 3}
"""Any float32; a float32 power of two; one-byte powers of two, rounded up; the same, rounded down."""

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


@triton.jit
def from_float8(code, MANTISSA: tl.constexpr):
    """The bits of float8, uint8, as float32: exact."""
    if INTERPRET:
        bits = code.to(tl.int32)
        a = bits & 0x7F
        # The exponent field moves into place; a product with a power of two sets it right, subnormals too.
        value = (a << (23 - MANTISSA)).to(tl.float32, bitcast=True) * (
            1.329227995784916e36 if MANTISSA == 3 else 5.192296858534828e33
        )
        if MANTISSA == 3:
            value = tl.where(a == 0x7F, float("nan"), value)
        else:
            value = tl.where(a > 0x7C, float("nan"), tl.where(a == 0x7C, float("inf"), value))
        # The sign as a bit: some versions negate by subtracting from zero, which loses that of zero.
        return (value.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    if MANTISSA == 3:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return code.to(tl.float8e5, bitcast=True).to(tl.float32)


# ----------------------------------------------------------------------- what the launches have in common

Config = dict[str, Any]
"""A kernel's tile sizes, and `num_warps` and `num_stages`."""


def wrap_triton(kernel: Any) -> Any:
    """`kernel` as the compiler can see it; under the interpreter, or with a fixed configuration, itself."""
    return kernel if isinstance(kernel, Untuned) else OnItsDevice(torch.library.wrap_triton(kernel))


_REAL = (Tensor, torch.nn.Parameter)  # not what stands for a tensor while a graph is traced


class OnItsDevice:
    """A kernel that is launched on the GPU of its first argument, whichever GPU is the current one."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        launch = self.kernel[grid]

        def on_its_device(x: Tensor, *args: Any, **constants: Any) -> Any:
            if type(x) not in _REAL or not x.is_cuda:
                return launch(x, *args, **constants)
            with torch.cuda.device(x.device):
                return launch(x, *args, **constants)

        return on_its_device


def tuned(configs: tuple[Config, ...], key: list[str], updates: tuple[str, ...] = ()) -> Any:
    """Decorates a kernel that chooses among `configs` by timing them, once for each value of `key`.

    `updates` names the pointers that the kernel both reads and writes; timing it restores what they point to.
    The first is the default: the interpreter, which has nothing to time, takes it. `kernel.fn` is the plain
    kernel.
    """
    if INTERPRETING:
        return lambda kernel: Untuned(kernel, configs[0])
    apart = [
        triton.Config(
            {name: value for name, value in config.items() if not name.startswith("num_")},
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        for config in configs
    ]
    return triton.autotune(configs=apart, key=key, restore_value=list(updates) or None)


class Untuned:
    """A kernel with one configuration, started like an autotuned one. `fn` is the plain kernel."""

    def __init__(self, kernel: Any, config: Config) -> None:
        self.fn, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.fn[grid](*args, **kwargs, **self.config)


def empty_scale(x: Tensor, shape: tuple[int, ...], scales: str) -> Tensor:
    """Room for scales: float32, or uint8 for one-byte formats."""
    one_byte = SCALE_FORMATS[scales] >= ONE_BYTE.value
    return x.new_empty(shape, dtype=torch.uint8 if one_byte else torch.float32)
