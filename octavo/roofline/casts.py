"""The bytes that casting to float8 reads and writes, and their time.

A cast is bound by memory traffic, not arithmetic. The cost of each way of casting is counted relative to the
same layer in bfloat16, in bytes per element, for three kinds of tensors: inputs of linears, gradients of
their outputs, and weights. A tensor is `fused` if one of octavo's kernels produces it (norm, SwiGLU, the
backward of rotary embeddings, AdamW), and `kept` if it is also needed in bfloat16 (the gradient of the
residual stream). If it is not, its producer saves the two bytes of writing it.

    torchao      compiled code. Inputs and weights are kept in bfloat16 and cast again in backward.
    kernels      octavo's kernels, not fused: one pass for the maxima, one pass that casts rows and columns
    fused        octavo's fused modules as they are: as `producers` where maxima are given, else as `kernels`
    producers    maxima computed by the producer, then one read and two casts
    transpose    rows cast by the producer, columns by transposing float8 (power-of-two scales only)
    previous     delayed scaling: the producer makes both casts

octavo casts weights once per step, torchao in every microbatch. The bytes of `kernels` and `fused` are those
of traced layers (`TRACED`); the ways after them are what could be.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

from octavo.roofline.devices import Gpu

FLOAT8_GEMMS: Final[Mapping[str | None, tuple[str, ...]]] = MappingProxyType(
    {
        None: (),
        "tensorwise": ("output", "grad_input", "grad_weight"),
        "tensorwise_previous_step": ("output", "grad_input", "grad_weight"),
        "rowwise": ("output", "grad_input", "grad_weight"),
        "rowwise_with_gw_hp": ("output", "grad_input"),
        "blockwise": ("output", "grad_input", "grad_weight"),
        "mxfp8": ("output", "grad_input", "grad_weight"),
    }
)
"""Recipe (None: bfloat16) -> the products that it computes in float8."""

# Recipes whose scales cover a tile that one thread block holds, so no separate pass for maxima.
_LOCAL = frozenset({"blockwise", "mxfp8"})


@dataclass(frozen=True)
class TracedBytes:
    """Bytes that our kernels read and write per element to cast it both ways, scales and maxima included.

    alone: without its producer's help. given: with the maxima that its producer computed. weight: of a
    weight's element, once per step.
    """

    alone: float
    given: float
    weight: float


TRACED: Final[Mapping[str, TracedBytes]] = MappingProxyType(
    {
        "tensorwise": TracedBytes(6.00, 4.00, 6.00),  # maxima 2; cast 2 + 1 + 1
        "tensorwise_previous_step": TracedBytes(4.00, 4.00, 6.00),
        "rowwise": TracedBytes(6.27, 4.17, 6.28),  # rows 2 + 1, columns 2 + 1; maxima of strips of rows
        "rowwise_with_gw_hp": TracedBytes(3.00, 3.00, 8.03),  # rows only; of a weight both, in two formats
        "blockwise": TracedBytes(4.06, 4.06, 4.00),
        "mxfp8": TracedBytes(4.24, 4.24, 4.06),
    }
)
"""What `benchmarks/layer_traffic.py` counts in compiled layers; tests/benchmarks/test_layer_traffic.py."""

STREAM: Final = 0.8
"""Share of the memory bandwidth that a good kernel reaches which reads and writes in order; E."""
_COMPILED: Final = 0.62
"""The same of casts in compiled code; E, fitted with the next to the speedups quoted for torchao."""
_COMPILED_ACROSS: Final = 0.46
"""The same where they write transposed (pytorch issues 130015, 133242)."""


@dataclass(frozen=True)
class Tensors:
    """Elements that a layer casts in forward and backward. inputs and grads: (fused, kept beside, not fused).

    fused: made by a kernel that can cast; kept: so, but wanted in bfloat16 too; other: made by another
    library's kernel.
    """

    inputs: tuple[float, float, float]
    grads: tuple[float, float, float]
    weights: float


@dataclass(frozen=True)
class Bytes:
    """Bytes of casts: along memory, and those that write transposed."""

    straight: float
    across: float = 0.0

    @property
    def total(self) -> float:
        return self.straight + self.across


def _torchao(tensors: Tensors, recipe: str, microbatches: int) -> Bytes:
    x, dy, w = sum(tensors.inputs), sum(tensors.grads), tensors.weights
    if recipe in ("rowwise", "rowwise_with_gw_hp"):
        both = x + w if recipe == "rowwise" else w  # gw_hp leaves the input's transpose in bfloat16
        # Maxima 2, cast 2 + 1; for the other product the same again, from what was kept. A gradient's row
        # and column maxima are taken in one read.
        column = 3 * dy if recipe == "rowwise" else 0.0
        return Bytes(5 * (x + w) + 5 * dy, 5 * both + column)
    if recipe in _LOCAL:
        return Bytes(3 * (x + w + dy), 3 * (x + w + dy))
    # Maxima 2, cast 2 + 1, then a transposed copy of the float8 data, 1 + 1.
    return Bytes(5 * (x + w + dy), 2 * (x + w + dy))


def _ours(fused: float, kept: float, other: float, weight: float) -> Callable[[Tensors, str, int], Bytes]:
    """Counts by bytes per element of each kind; weights once per step."""

    def count(tensors: Tensors, recipe: str, microbatches: int) -> Bytes:
        per_kind = (fused, kept, other)
        inputs = sum(b * n for b, n in zip(per_kind, tensors.inputs, strict=True))
        grads = sum(b * n for b, n in zip(per_kind, tensors.grads, strict=True))
        if recipe == "rowwise_with_gw_hp":  # no column casts: one byte less to write, and to read again
            inputs, grads = 0.75 * inputs, 0.75 * grads
        return Bytes(inputs + grads + weight * tensors.weights / microbatches)

    return count


def _traced(tensors: Tensors, recipe: str, microbatches: int, *, fused: bool) -> Bytes:
    each = TRACED[recipe]
    given = sum(t[kind] for t in (tensors.inputs, tensors.grads) for kind in (0, 1)) if fused else 0.0
    alone = sum(tensors.inputs) + sum(tensors.grads) - given
    return Bytes(each.given * given + each.alone * alone + each.weight * tensors.weights / microbatches)


WAYS: Final[Mapping[str, Callable[[Tensors, str, int], Bytes]]] = MappingProxyType(
    {
        "torchao": _torchao,
        "kernels": partial(_traced, fused=False),
        "fused": partial(_traced, fused=True),
        "producers": _ours(4, 4, 4, 4),  # 2 + 1 + 1
        "transpose": _ours(1, 3, 4, 4),  # 1 - 2, then 1 + 1; 1, then 1 + 1; 2 + 1 + 1
        "previous": _ours(0, 2, 4, 4),  # 1 + 1 - 2; 1 + 1; 2 + 1 + 1
    }
)
"""How casts are made -> their bytes, beyond those of the bfloat16 layer."""


def cast_bytes(tensors: Tensors, recipe: str, way: str, *, microbatches: int = 1) -> float:
    """Bytes that casting adds to one microbatch's forward and backward.

    microbatches: microbatches per step, which share the work done once per step.
    """
    return WAYS[way](tensors, recipe, microbatches).total


def cast_seconds(gpu: Gpu, tensors: Tensors, recipe: str, way: str, *, microbatches: int = 1) -> float:
    """Seconds that casting adds to one microbatch's forward and backward."""
    made = WAYS[way](tensors, recipe, microbatches)
    straight, across = (_COMPILED, _COMPILED_ACROSS) if way == "torchao" else (STREAM, STREAM)
    return made.straight / (gpu.hbm * straight) + made.across / (gpu.hbm * across)
