"""Delayed scaling within a step: an operand's statistics, and its cast with the previous maximum.

A scale needs the tensor's maximum before the first element can be cast: one read for the maximum, one for the
cast. The maximum of a layer's input, or of its output's gradient, changes little between steps, so the
previous step's can be used, and the only read also computes the maximum for the next step. The price:
elements beyond the old maximum saturate. They are counted. Non-finite elements become NaN.

A step may run a layer many times, for microbatches, recomputation and pipeline passes. The maximum over all
of them does not change if one is repeated; saturated elements are counted only when a tensor is first met.
The scale is constant within a step, so recomputation casts as the first pass did. `delayed_scaling.py`
updates the statistics between steps. Before its first update, and in inference, operands are cast just in
time.
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
    """Statistics of one operand of one layer, or of several layers with the same input; tensors on its
    device.

    previous_amax: the maximum that determines the scale, float32 [1, 1]. valid: whether that is the previous
    step's; if not, operands are cast just in time. current_amax: this step's maximum so far. counts: this
    step's saturated and total elements, int64 [2].
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
        """Add a tensor's statistics. `saturated` is None if it was cast just in time or recorded before."""
        self.current_amax.copy_(torch.maximum(self.current_amax, amax.to(self.current_amax.dtype)))
        if saturated is not None:
            self.counts.add_(torch.stack([saturated, saturated.new_full((), elements)]))


class LayerStatistics(NamedTuple):
    """The statistics of a layer's two operands; None for one that is always cast just in time."""

    input: OperandStatistics | None = None
    grad_output: OperandStatistics | None = None


def is_recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as activation checkpointing does.

    Always False in compiled code, whose recomputation does not record.
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
    """`quantize_both`, with the previous step's scale if `statistics` has one.

    `record`: whether to record this tensor's maximum; `count_saturated`: and its saturated elements. Each
    rank records its shard of a sharded tensor; `DelayedScaling` combines them.
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
