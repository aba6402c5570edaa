"""Measures what one cast does to one tensor; `octavo.float8.health` defines the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.float8.quantize import block_amax, scale_values, scales_from_amax, to_float32
from octavo.float8.recipe import FULL, Cast, Recipe


@dataclass(frozen=True)
class Slot:
    """One cast to measure. `transposed`: the operand is the transpose of the measured tensor."""

    recipe: str
    operand: str
    gemms: tuple[str, ...]
    cast: Cast
    transposed: bool


def cast_slots(recipe: Recipe) -> tuple[Slot, ...]:
    """The distinct casts of `recipe`."""
    o, gi, gw = recipe.output, recipe.grad_input, recipe.grad_weight
    slots = []
    for operand, first, second in (
        ("input", ("output", o.a), ("grad_weight", gw.b)),
        ("weight", ("output", o.b), ("grad_input", gi.b)),
        ("grad_output", ("grad_input", gi.a), ("grad_weight", gw.a)),
    ):
        (gemm, row), (other, col) = first, second
        shared = row is not None and row == col and row.square
        if row is not None:
            gemms = (gemm, other) if shared else (gemm,)
            slots.append(Slot(recipe.name, operand, gemms, row, False))
        if col is not None and not shared:
            slots.append(Slot(recipe.name, operand, (other,), col, True))
    return tuple(slots)


NUMBERS = 7  # amax, values, and how many are nonfinite, flushed, saturated; signal, noise


def _spread(blocks: Tensor, block: tuple[int, int], rows: Tensor, cols: int) -> Tensor:
    """`blocks[R / r, C / c]` at rows `rows[n]`, per element: `[n, C]`, or `[n, 1]` if rows are blocks."""
    blocks = blocks[:1] if block[0] == FULL else blocks.index_select(0, rows // block[0])
    return blocks if block[1] == FULL else blocks.repeat_interleave(block[1], dim=1)[:, :cols]


def _energy(x: Tensor) -> Tensor:
    """The sum of squares, in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def measure(x: Tensor, slots: Sequence[Slot], sample: int | None) -> Tensor:
    """What each of `slots` does to `x[R, C]`: float64, `NUMBERS` for each, concatenated.

    Scales and amax are those of all of x; the rest is counted in at most `sample` evenly spaced rows (None:
    all).
    """
    # An odd step, so that it does not sample the same few positions of every sequence.
    step = 1 if sample is None else -(-x.shape[0] // sample)
    step = max(step + 1 - step % 2, 1)
    rows = torch.arange(0, x.shape[0], step, device=x.device)
    sampled = x[::step].float()
    not_zero = sampled != 0
    nonfinite = torch.count_nonzero(~sampled.isfinite()).double()
    values = torch.full_like(nonfinite, sampled.numel())
    signal = _energy(sampled)
    numbers = []
    for slot in slots:
        cast, limit = slot.cast, torch.finfo(slot.cast.dtype).max
        block = (cast.block[1], cast.block[0]) if slot.transposed else cast.block
        amax = block_amax(x, block)
        s, scale = scales_from_amax(amax, cast)
        scaled = sampled * _spread(s, block, rows, x.shape[1])
        data = to_float32(scaled.clamp(-limit, limit).to(cast.dtype))
        back = data * _spread(scale_values(scale), block, rows, x.shape[1])
        # Neither counts values of a block with a NaN or an infinity: those come back as NaN.
        flushed = torch.count_nonzero((back == 0) & not_zero).double()
        saturated = torch.count_nonzero(scaled.abs() > limit).double()
        largest = amax.amax().double() if amax.numel() else torch.zeros_like(values)
        numbers += [largest, values, nonfinite, flushed, saturated, signal, _energy(back - sampled)]
    return torch.stack(numbers) if numbers else x.new_zeros(0, dtype=torch.float64)
