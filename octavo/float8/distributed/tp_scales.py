"""Operands that are spread over a group of ranks: one rule for their scales, and which axis is whose.

A tensor parallel linear keeps its weight in shards and multiplies shards. A scale must still be that of the
whole operand, or the shards of one tensor would round differently from the tensor. So wherever the sharded
axis of an operand is one that its cast reduces whole, the maxima are reduced over the group as well; finer
blocks must not straddle two ranks, and then need nothing.

    weight sharded by     w_NK  w_KN  x_MK  x_KM  dy_MN  dy_NM      x            y
    output features, N    rows  cont                cont   rows     whole        sharded by N
    input features, K     cont  rows  cont  rows                    sharded by K a term of a sum

(`rows` and `cont`raction are the axes of an operand, as in `recipe.py`; a blank is an operand that every rank
has whole.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.float8.recipe import FULL, Cast, Recipe


@dataclass(frozen=True)
class ShardedAxis:
    """Every rank of the process group called `group` holds one part of `axis` of an operand."""

    axis: int
    group: str

    @property
    def transposed(self) -> ShardedAxis:
        return ShardedAxis(1 - self.axis, self.group)

    def reduce_amax(self, amax: Tensor, cast: Cast) -> Tensor:
        """The maxima of the whole operand's blocks, given this rank's. A collective call if blocks span the
        axis.
        """
        if cast.block[self.axis] != FULL:
            return amax
        # Not every backend lets a NaN win a maximum. As integers the bits of non-negative floats are ordered
        # as the floats are, with NaN above infinity.
        bits = amax.float().view(torch.int32).contiguous()
        bits = torch.ops._c10d_functional.all_reduce(bits, "max", self.group)
        return torch.ops._c10d_functional.wait_tensor(bits).view(torch.float32)


@dataclass(frozen=True)
class TensorParallelSpec:
    """A weight `w[N, K]` of which every rank of `group` holds an even part of `axis`: 0 is N, 1 is K.

    `pieces` is set where the output, a sum over the ranks, is to be scattered by tokens; see `gather.py`.
    """

    axis: int
    group: str
    size: int
    pieces: int | None = None

    @property
    def weight(self) -> ShardedAxis:
        """How `w_NK` is split; `w_KN` is its transpose, and likewise below."""
        return ShardedAxis(self.axis, self.group)

    @property
    def input(self) -> ShardedAxis | None:
        """How `x_MK` is split."""
        return ShardedAxis(1, self.group) if self.axis == 1 else None

    @property
    def grad_output(self) -> ShardedAxis | None:
        """How `dy_MN` is split."""
        return ShardedAxis(1, self.group) if self.axis == 0 else None

    def check(self, recipe: Recipe, features: int) -> None:
        """Raise ValueError unless `features` (the extent of the sharded axis, over all ranks) divides into
        whole blocks.
        """
        name = ("out_features", "in_features")[self.axis]
        each, rest = divmod(features, self.size)
        if rest:
            raise ValueError(
                f"{name}={features} does not divide evenly over {self.size} tensor parallel ranks: "
                f"choose {name} or the number of ranks so that it does"
            )
        gemms = recipe.gemms
        split = {
            0: (("output", "b", 0), ("grad_input", "b", 1), ("grad_input", "a", 1), ("grad_weight", "a", 0)),
            1: (("output", "b", 1), ("grad_input", "b", 0), ("output", "a", 1), ("grad_weight", "b", 0)),
        }[self.axis]
        for gemm, operand, axis in split:
            cast: Cast | None = getattr(gemms[gemm], operand)
            block = 1 if cast is None or cast.block[axis] == FULL else cast.block[axis]
            if each % block:
                raise ValueError(
                    f"recipe {recipe.name!r} scales blocks of {block} along {name}, and each of "
                    f"{self.size} ranks would hold {each} of its {features}: a block would straddle two "
                    f"ranks. Make {name} a multiple of {block * self.size}, use fewer ranks, or use a recipe "
                    "with one scale a tensor or a row"
                )
