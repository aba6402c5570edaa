"""Scales of operands that are sharded over a group of ranks, and which operands those are.

A tensor parallel linear keeps its weight in shards and multiplies shards. A scale must still be that of the
whole operand, or a shard would round differently from the tensor. So if the sharded axis of an operand is one
that its cast reduces entirely, the maxima are reduced over the group too. Finer blocks must not straddle two
ranks; then they need no communication.

    weight sharded by     w_NK  w_KN  x_MK  x_KM  dy_MN  dy_NM      x             y
    output features, N    rows  cont                cont   rows     whole         sharded by N
    input features, K     cont  rows  cont  rows                    sharded by K  one term of a sum

`rows` and `cont`raction are the sharded axis of an operand, as in `recipe.py`; blank means every rank has the
whole operand.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.float8.distributed.amax_reduction import all_reduce_amax
from octavo.float8.recipe import FULL, Cast, Recipe


@dataclass(frozen=True)
class ShardedAxis:
    """An operand whose `axis` is sharded over the ranks of the process group named `group`."""

    axis: int
    group: str

    @property
    def transposed(self) -> ShardedAxis:
        return ShardedAxis(1 - self.axis, self.group)

    def reduce_amax(self, amax: Tensor, cast: Cast) -> Tensor:
        """The block maxima of the whole operand, given this rank's. Collective if blocks span the axis."""
        return all_reduce_amax(amax, [self.group]) if cast.block[self.axis] == FULL else amax


@dataclass(frozen=True)
class TensorParallelSpec:
    """How tensor parallelism shards a weight `w[N, K]`: evenly along `axis` (0 is N, 1 is K) over `group`.

    `size`: the number of ranks. `pieces` is set if the output, a sum over the ranks, is to be scattered by
    tokens; see `tp_gather.py`.
    """

    axis: int
    group: str
    size: int
    pieces: int | None = None

    @property
    def weight(self) -> ShardedAxis:
        """The sharding of `w_NK`; that of `w_KN` is its transpose, and likewise below."""
        return ShardedAxis(self.axis, self.group)

    @property
    def input(self) -> ShardedAxis | None:
        """The sharding of `x_MK`; None if it is whole."""
        return ShardedAxis(1, self.group) if self.axis == 1 else None

    @property
    def grad_output(self) -> ShardedAxis | None:
        """The sharding of `dy_MN`; None if it is whole."""
        return ShardedAxis(1, self.group) if self.axis == 0 else None

    def check(self, recipe: Recipe, features: int) -> None:
        """Raise ValueError unless `features`, the size of the sharded axis, divides into whole blocks per
        rank.
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
                    f"recipe {recipe.name!r} scales blocks of {block} along {name}, but each of {self.size} "
                    f"ranks would hold {each} of its {features}, so a block would straddle two ranks. Make "
                    f"{name} a multiple of {block * self.size}, use fewer ranks, or use a recipe with one "
                    "scale per tensor or per row"
                )
