"""AdamW's update of one piece of a parameter as a function that compiles to one kernel.

`low_bit.AdamW` calls it on a GPU. There the same operations, called one by one, are 25 kernels per piece and
move about 250 bytes per parameter. Compiled, each tensor is read once and written once:

    weights, moments, gradients in bfloat16    2 + 2 for w, m and v each, and 2 for g    14 bytes
    float32 weights and gradients              4 + 4, 2 + 2, 2 + 2, and 4                20 bytes

What is stored in bfloat16 is rounded stochastically. The random bits come from a hash of the seed and the
element's index, computed in the kernel, since a generator's bits would have to be written and read. The hash
is two rounds of multiply and xor-shift on 32 bits, with constants found by a search for the least bias
(https://github.com/skeeto/hash-prospector).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_GOLDEN = -0x61C88647  # 2**32 / golden ratio, as int32: spreads consecutive indices
_MASK64 = (1 << 64) - 1


def hash32(x: Tensor) -> Tensor:
    """int32 -> int32, a bijection whose output bits depend on all input bits."""
    x = x ^ _shift(x, 16)
    x = x * 0x21F0AAAD
    x = x ^ _shift(x, 15)
    x = x * 0x735A2D97
    return x ^ _shift(x, 15)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits without copies of the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def rounded(value: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `value` in `dtype`; bfloat16 is rounded stochastically with `noise`, int32 in [0, 2**16).
    Non-finite values are kept.
    """
    if dtype != torch.bfloat16:
        return value.to(dtype)
    up = ((value.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(value.isfinite(), up, value).to(dtype)


def update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, numbers: Tensor, seed: int) -> None:
    """Step `w` and its moments `m` and `v` in place, by gradient `g`; all of one shape.

    numbers: float32 `[decay, 1 - beta1, beta2, 1 - beta2, rate, correction, eps]` on w's device, where
    decay = 1 - lr x weight_decay, rate = lr / (1 - beta1^t) and correction = 1 - beta2^t. seed: of the random
    bits, below 2**31.
    """
    decay, rest1, beta2, rest2, rate, correction, eps = numbers.unbind()
    index = torch.arange(w.numel(), dtype=torch.int32, device=w.device).view(w.shape)
    bits = hash32(index * _GOLDEN + seed)
    gradient = g.float()
    first = m.float()
    first = first + rest1 * (gradient - first)
    second = v.float() * beta2 + rest2 * gradient * gradient
    new = w.float() * decay - rate * first / ((second / correction).sqrt() + eps)
    m.copy_(rounded(first, bits & 0xFFFF, m.dtype))
    v.copy_(rounded(second, _shift(bits, 16), v.dtype))
    w.copy_(rounded(new, hash32(bits ^ seed) & 0xFFFF, w.dtype))


def seed_of(step: int, place: int, piece: int) -> int:
    """A seed below 2**31 for a piece of the parameter at `place` in a step (the mixer of splitmix64)."""
    x = ((step << 40) + (place << 20) + piece + 1) * 0x9E3779B97F4A7C15 & _MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return (x ^ x >> 31) >> 33


@cache
def compiled_update() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None]:
    """`update`, compiled once for pieces of any size."""
    return torch.compile(update, fullgraph=True, dynamic=True)
