"""An operand whose scale is taken from the step before: what is known of it, and its cast.

A scale needs the maximum of the tensor before the first element can be cast: a read for the maximum, and one
for the cast. The maximum of a layer's input, or of its output's gradient, changes little from one step to the
next, so the last step's will do, and the one read notes the maximum for the next step. What lies beyond the
old maximum saturates and is counted; what is no finite number becomes NaN.

A step may run a layer many times, by microbatches, recomputation, and pipeline passes. The maximum of all of
them is what it is however often one is repeated; saturated elements are counted where a tensor is met for the
first time. Within a step the scale stays, so recomputation casts as the first pass did. `previous_step.py`
decides between steps; until it does, and for tensors in inference, everything is cast just in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.float8.casts import gpu_cast
from octavo.float8.distributed.tp_scales import ShardedAxis
from octavo.float8.quantize import Quantized, block_amax, quantize_both, quantize_with_amax, transposed
from octavo.float8.recipe import Cast, When


@dataclass(eq=False)
class OperandStatistics:
    """Of one operand of one layer, or of several layers that read one tensor; tensors on its device.

    amax: the maximum that scales come from, float32 [1, 1]. known: whether that is the last step's; if not,
    operands are cast just in time. seen: the maximum of this step so far. counts: this step's elements, int64
    [2], the saturated ones and all.
    """

    previous_amax: Tensor
    current_amax: Tensor
    counts: Tensor
    valid: bool = False

    @staticmethod
    def on(device: torch.device) -> OperandStatistics:
        zero = torch.zeros(1, 1, device=device)
        return OperandStatistics(
            zero, torch.zeros_like(zero), torch.zeros(2, dtype=torch.int64, device=device)
        )

    def record(self, amax: Tensor, saturated: Tensor | None, elements: int) -> None:
        """Add what a tensor showed. `saturated` is None where it was cast just in time, or met before."""
        self.current_amax.copy_(torch.maximum(self.current_amax, amax.to(self.current_amax.dtype)))
        if saturated is not None:
            self.counts.add_(torch.stack([saturated, saturated.new_full((), elements)]))


class LayerStatistics(NamedTuple):
    """A layer's. None: always just in time."""

    input: OperandStatistics | None = None
    grad_output: OperandStatistics | None = None


def is_recomputing() -> bool:
    """Whether this is a forward pass inside a backward pass, as activation checkpointing runs it.

    Compiled code never asks: what it recomputes, it does without the notes.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def quantize_operand(
    x: Tensor,
    row: Cast | None,
    col: Cast | None,
    sharded: ShardedAxis | None = None,
    statistics: OperandStatistics | None = None,
    *,
    record: bool = True,
    count_saturated: bool = True,
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """`quantize_both`, with the scale of `operand` if it is known.

    `notes`: whether this step's maximum is to be noted; `counts`: and the saturated elements counted. Of a
    tensor that ranks share, each notes its part; `DelayedScaling` puts them together.
    """
    cast = row or col
    if statistics is None or cast is None or cast.when is When.JUST_IN_TIME or x.numel() == 0:
        return quantize_both(x, row, col, sharded)
    if not statistics.valid:
        if record:
            statistics.record(block_amax(x, cast.block), None, x.numel())
        return quantize_both(x, row, col, sharded)
    if gpu_cast.supports(x, cast):
        one, two, amax, saturated = gpu_cast.cast_with_amax(
            x, statistics.previous_amax, cast, row is not None, col is not None
        )
        first, second = Quantized(*one), Quantized(*two)
    else:
        first = quantize_with_amax(x, statistics.previous_amax, cast)
        second = transposed(first)
        size = x.abs()
        amax = block_amax(x, cast.block)
        saturated = ((size > statistics.previous_amax) & size.isfinite()).sum()
    if record:
        statistics.record(amax, saturated if count_saturated else None, x.numel())
    return first if row is not None else x, second if col is not None else x.t()
