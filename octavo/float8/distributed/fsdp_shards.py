"""The arithmetic of one shard of a float8 weight: its blocks' maxima, and its bytes, equal to the whole
weight's.

FSDP2 cuts tensors at any row, so 128-blocks too. A shard writes its maxima into the grid of the whole
weight's blocks, a reduction over the ranks completes the grid, and the shard is cast with its part of the
grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from octavo.float8.casts import gpu_cast
from octavo.float8.distributed.amax_reduction import all_reduce_amax
from octavo.float8.quantize import block_amax, cast_data, scales_from_amax
from octavo.float8.recipe import FULL, Cast


@dataclass(frozen=True)
class ShardLayout:
    """The position of a shard: part `rank` of `world` parts of the weight `[N, K]`, cut along `dim` (0:
    rows).

    As in FSDP2, each part has ceil(size / world) rows or columns; the last ones are shorter or empty.
    """

    N: int
    K: int
    dim: int
    world: int
    rank: int

    @property
    def padded(self) -> tuple[int, int]:
        """The shape of the longest part, which every rank gathers."""
        size = [self.N, self.K]
        size[self.dim] = -(-size[self.dim] // self.world)
        return size[0], size[1]

    @property
    def start(self) -> tuple[int, int]:
        """The row and column of the whole weight at which this part begins."""
        at = min(self.rank * self.padded[self.dim], (self.N, self.K)[self.dim])
        return (at, 0) if self.dim == 0 else (0, at)

    def grid(self, cast: Cast) -> tuple[int, int]:
        """The number of blocks of the whole weight along each axis."""
        rows, cols = (
            1 if b == FULL else -(-n // b) for b, n in zip(cast.block, (self.N, self.K), strict=True)
        )
        return rows, cols


class _Cut(NamedTuple):
    """A shard extended to a block's edge: the grid index of its first block, and the zeros in front."""

    first: tuple[int, int]
    lead: tuple[int, int]


def _cut(layout: ShardLayout, cast: Cast) -> _Cut:
    pairs = [(0, 0) if b == FULL else divmod(at, b) for b, at in zip(cast.block, layout.start, strict=True)]
    return _Cut((pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1]))


def _grown(shard: Tensor, cut: _Cut) -> Tensor:
    return F.pad(shard, (cut.lead[1], 0, cut.lead[0], 0)) if any(cut.lead) else shard


def shard_amax(shard: Tensor, layout: ShardLayout, cast: Cast) -> Tensor:
    """This shard's maxima in the whole weight's grid of blocks: float32, zero where it has no elements."""
    grid = torch.zeros(layout.grid(cast), dtype=torch.float32, device=shard.device)
    if shard.numel():
        cut = _cut(layout, cast)
        part = block_amax(_grown(shard, cut), cast.block)
        grid.narrow(0, cut.first[0], part.shape[0]).narrow(1, cut.first[1], part.shape[1]).copy_(part)
    return grid


def cast_shard(shard: Tensor, amax: Tensor, layout: ShardLayout, cast: Cast) -> tuple[Tensor, Tensor]:
    """The shard's float8 bytes, zero-padded to `layout.padded` (uint8), and the scale of the whole weight.

    `shard` has the dtype to cast from; `amax` are the whole weight's block maxima.
    """
    amax = amax.to(shard.dtype)
    s, scale = scales_from_amax(amax, cast)
    padded = torch.zeros(layout.padded, dtype=torch.uint8, device=shard.device)
    if cast.block == (FULL, FULL) and gpu_cast.supports(shard, cast):
        rows = padded.narrow(0, 0, shard.shape[0]).narrow(1, 0, shard.shape[1])
        rows.copy_(gpu_cast.cast_by_amax(shard, amax, cast).view(torch.uint8))
    elif shard.numel():
        cut = _cut(layout, cast)
        grown = _grown(shard, cut)
        blocks = (1 if b == FULL else -(-n // b) for b, n in zip(cast.block, grown.shape, strict=True))
        for axis, (first, count) in enumerate(zip(cut.first, blocks, strict=True)):
            s = s.narrow(axis, first, count)
        data = cast_data(grown, s, cast).view(torch.uint8)[cut.lead[0] :, cut.lead[1] :]
        padded.narrow(0, 0, shard.shape[0]).narrow(1, 0, shard.shape[1]).copy_(data)
    return padded, scale


def reduce_maxima(grids: Sequence[Tensor], groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
    """The element-wise maximum of each of `grids` over all `groups`, in one all-reduce per group."""
    flat = torch.cat([grid.flatten() for grid in grids])
    parts = all_reduce_amax(flat, [group.group_name for group in groups if group.size() > 1]).split(
        [grid.numel() for grid in grids]
    )
    return [part.view(grid.shape) for part, grid in zip(parts, grids, strict=True)]
