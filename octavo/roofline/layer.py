"""Predicted time of one Llama layer, forward and backward: GEMMs, attention, elementwise kernels and casts.

Elementwise work is what compiled layers read and write in bfloat16, and `fused` ones besides (T tokens, D
width, Q and G query and key/value features, F feed-forward width; `benchmarks/layer_traffic.py`), elements:

    forward    norm, add + norm, add                    9 T D
               rotation of q and k                      2 T (Q + G)
               silu(a) * b                              3 T F
               fused: v's copy, maxima of tiles         2 T G + T (5 D + 3 F) / 32
    backward   norm + the stream's gradient, twice      4 T D each
               sums of the inputs' gradients            4 T D       (fused: 7 T D, by kernels of their own)
               rotation                                 2 T (Q + G)
               silu(a) * b                              5 T F
               fused: maxima of tiles                   T (6 D + 5 F) / 32
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from octavo.roofline.casts import FLOAT8_GEMMS, STREAM, Tensors, cast_seconds
from octavo.roofline.devices import Gpu
from octavo.roofline.gemm import (
    Shape,
    attention_flops,
    attention_seconds,
    gemm_seconds,
    linear_shapes,
)

_BF16: Final = 2


@dataclass(frozen=True)
class Block:
    """The sizes of one layer. queries, groups: heads x head width of q, and of k and v."""

    dim: int
    queries: int
    groups: int
    hidden: int

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Linear layer -> (inputs K, outputs N)."""
        return {
            "wq": (self.dim, self.queries),
            "wk": (self.dim, self.groups),
            "wv": (self.dim, self.groups),
            "wo": (self.queries, self.dim),
            "w1": (self.dim, self.hidden),
            "w3": (self.dim, self.hidden),
            "w2": (self.hidden, self.dim),
        }

    @property
    def weights(self) -> int:
        """Parameters of the linear layers."""
        return sum(k * n for k, n in self.linears.values())

    @property
    def joined_linears(self) -> Mapping[str, tuple[int, int]]:
        """As `linears`, those of one input as one."""
        return {
            "wq+wk+wv": (self.dim, self.queries + 2 * self.groups),
            "wo": (self.queries, self.dim),
            "w1+w3": (self.dim, 2 * self.hidden),
            "w2": (self.hidden, self.dim),
        }

    def gemms(self, tokens: int, recipe: str | None = None, *, joined: bool = False) -> list[Shape]:
        """All 21 products of forward and backward; 12 where linears of one input are `joined`."""
        float8 = FLOAT8_GEMMS[recipe]
        shapes: list[Shape] = []
        for inputs, outputs in (self.joined_linears if joined else self.linears).values():
            for name in ("output", "grad_input", "grad_weight"):
                shapes.append(linear_shapes(tokens, inputs, outputs, float8=name in float8)[name])
        return shapes

    def attention_flops(self, tokens: int, seq_len: int) -> float:
        """Causal, forward and backward."""
        return sum(attention_flops(tokens, seq_len, self.queries))

    def elementwise_bytes(self, tokens: int, *, fused: bool = False) -> tuple[float, float]:
        """(forward, backward), as the module's docstring counts them."""
        rotation = 2 * (self.queries + self.groups)
        forward = 9.0 * self.dim + rotation + 3 * self.hidden
        backward = 12.0 * self.dim + rotation + 5 * self.hidden
        if fused:
            forward += 2 * self.groups + (5 * self.dim + 3 * self.hidden) / 32
            backward += 3 * self.dim + (6 * self.dim + 5 * self.hidden) / 32
        return _BF16 * tokens * forward, _BF16 * tokens * backward

    def cast_tensors(self, tokens: int) -> Tensors:
        """What is cast: inputs of wq/wk/wv, wo, w1/w3 and w2; gradients of all seven outputs."""
        t, d, q, g, f = tokens, self.dim, self.queries, self.groups, self.hidden
        return Tensors(
            inputs=(float(t * (2 * d + f)), 0.0, float(t * q)),  # norms and SwiGLU; attention's output
            grads=(float(t * (2 * f + q + g)), float(t * 2 * d), float(t * g)),  # v's comes from attention
            weights=float(self.weights),
        )

    def fused_tensors(self, tokens: int) -> Tensors:
        """As `cast_tensors`, where fused layers are as they are: kernels give the maxima of norms' and
        SwiGLU's outputs and of the gradients of w1's, w3's and wo's outputs.
        """
        t, d, q, g, f = tokens, self.dim, self.queries, self.groups, self.hidden
        return Tensors(
            inputs=(float(t * (2 * d + f)), 0.0, float(t * q)),
            grads=(float(t * 2 * f), float(t * d), float(t * (q + 2 * g + d))),
            weights=float(self.weights),
        )

    def saved(self, tokens: int) -> Mapping[str, float]:
        """What a layer saves for backward, way -> bytes. Every count is a list of tensors.

        all: the stream twice, both norms, q, k, v, attention's output, w1's and w3's outputs, w2's input.
        recomputed: without norms' outputs and w2's input. float8: norms' and attention's outputs as float8
        operands, w1's and w3's outputs in float8, w2's input made again from them. tight: so, with the
        norms' outputs and attention's operand made again.

        What octavo's compiled layers do save (`benchmarks/layer_traffic.py` reads it off their graphs):
        bfloat16 and rowwise_with_gw_hp save "all"; kernels: all four operands are float8, w1's and w3's
        outputs bfloat16.
        """
        stream, norms = 2 * self.dim, 2 * self.dim
        attention = self.queries + 2 * self.groups + self.queries  # q, k, v, output
        pair, product = 2 * self.hidden, self.hidden
        wide = {
            "all": 2 * (stream + norms + attention + pair + product),
            "recomputed": 2 * (stream + attention + pair),
            "float8": 2 * (stream + attention) + norms + self.queries + pair,
            "tight": 2 * (stream + attention) + pair,
            "kernels": 2 * (stream + attention + pair) + norms + self.queries + product,
        }
        return {way: float(tokens * size) for way, size in wide.items()}


LLAMA3_8B: Final = Block(dim=4096, queries=4096, groups=1024, hidden=14336)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer's forward and backward, by what they go to."""

    gemms: float
    attention: float
    elementwise: float
    casts: float

    @property
    def total(self) -> float:
        return self.gemms + self.attention + self.elementwise + self.casts


def layer_time(
    gpu: Gpu,
    block: Block,
    tokens: int,
    seq_len: int,
    recipe: str | None = None,
    *,
    way: str = "producers",
    microbatches: int = 1,
    gemm_rates: tuple[float, float] | None = None,
    attention_rates: tuple[float, float] | None = None,
    bandwidth: float = STREAM,
    joined: bool = False,
) -> LayerTime:
    """The time of one layer for `tokens` tokens in sequences of `seq_len`, in `recipe` (None: bfloat16).

    joined: linears of one input are one product.
    way: of casting, see `casts.py`. gemm_rates: FLOP/s of (bfloat16, float8) products instead of a model by
    shape. attention_rates: (forward, backward) instead of the device's. bandwidth: the share that elementwise
    kernels reach.
    """
    gemms = block.gemms(tokens, recipe, joined=joined)
    if gemm_rates is None:
        products = sum(gemm_seconds(gpu, shape) for shape in gemms)
    else:
        products = sum(shape.flops / gemm_rates[shape.float8] for shape in gemms)
    casts = 0.0
    if recipe is not None:
        tensors = block.fused_tensors(tokens) if way == "fused" else block.cast_tensors(tokens)
        casts = cast_seconds(gpu, tensors, recipe, way, microbatches=microbatches)
    return LayerTime(
        gemms=products,
        attention=sum(attention_seconds(gpu, tokens, seq_len, block.queries, rates=attention_rates)),
        elementwise=sum(block.elementwise_bytes(tokens, fused=way == "fused")) / (gpu.hbm * bandwidth),
        casts=casts,
    )
