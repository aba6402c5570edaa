"""The predicted time of a GEMM, from its shape, and of attention.

A GPU computes a product in tiles, one tile a multiprocessor at a time, so a product whose tiles do not fill
the last wave leaves processors idle, and one whose sides are no multiples of a tile computes padding.
Besides, each tile's pipeline along the contraction must fill, data must come from memory, and a kernel must
be launched. The ceiling is the device's for a large product.

Letters: M rows, K contraction, N columns; 2 M K N FLOPs.
"""

import math
from dataclasses import dataclass
from typing import Final

from octavo.roofline.devices import Gpu

_TILES: Final = (((128, 256), 1.0), ((256, 128), 1.0), ((128, 128), 0.85), ((64, 128), 0.6))
"""Tiles that cuBLAS chooses from on Hopper, and the rate of each against the best; E."""
_FILL: Final = 128
"""Elements of the contraction that filling a tile's pipeline costs; E."""
_LAUNCH: Final = 4e-6
"""Seconds from one kernel to the next; E."""
_LARGE: Final = 8192
"""Side of the cube at which ceilings are quoted."""


@dataclass(frozen=True)
class Shape:
    """One product `a[M, K] . b[N, K]^T`; float8: whether its operands are."""

    M: int
    K: int
    N: int
    float8: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.M * self.K * self.N

    @property
    def bytes(self) -> float:
        """Operands read once, a bfloat16 result written."""
        size = 1 if self.float8 else 2
        return size * (self.M * self.K + self.N * self.K) + 2.0 * self.M * self.N


def linear_shapes(M: int, K: int, N: int, *, float8: bool = False) -> dict[str, Shape]:
    """The three products of a linear layer with M tokens, K inputs and N outputs, by name."""
    return {
        "output": Shape(M, K, N, float8),
        "grad_input": Shape(M, N, K, float8),
        "grad_weight": Shape(N, M, K, float8),
    }


def shape_efficiency(M: int, K: int, N: int, sms: int) -> float:
    """The share of the ceiling that tiles, waves and pipelines leave of a product on `sms` processors."""
    best = 0.0
    for (rows, cols), rate in _TILES:
        tiles = math.ceil(M / rows) * math.ceil(N / cols)
        waves = math.ceil(tiles / sms)
        best = max(best, rate * M * N / (waves * sms * rows * cols))
    return best * K / (K + _FILL)


def gemm_seconds(gpu: Gpu, shape: Shape) -> float:
    """Seconds of one GEMM on `gpu`; float8 on a GPU without float8 units takes bfloat16's time."""
    ceiling = (gpu.float8_ceiling if shape.float8 else None) or gpu.bf16_ceiling
    # The quoted product has an efficiency too, and reaches the ceiling with it.
    large = shape_efficiency(_LARGE, _LARGE, _LARGE, gpu.sms)
    efficiency = shape_efficiency(shape.M, shape.K, shape.N, gpu.sms) / large
    return max(shape.flops / (ceiling * efficiency), shape.bytes / gpu.hbm) + _LAUNCH


def attention_flops(tokens: int, keys: int, width: int, *, causal: bool = True) -> tuple[float, float]:
    """FLOPs of (forward, backward) for `tokens` queries on `keys` keys each, heads x head width = `width`.

    Two products forward; backward five, as it computes the scores again. A causal mask halves both.
    """
    product = 2.0 * tokens * keys * width * (0.5 if causal else 1.0)
    return 2 * product, 5 * product


def attention_seconds(
    gpu: Gpu,
    tokens: int,
    keys: int,
    width: int,
    *,
    causal: bool = True,
    rates: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Seconds of (forward, backward); `rates` in FLOP/s, instead of the device's."""
    flops = attention_flops(tokens, keys, width, causal=causal)
    forward, backward = (f / r for f, r in zip(flops, rates or gpu.attention, strict=True))
    return forward, backward
