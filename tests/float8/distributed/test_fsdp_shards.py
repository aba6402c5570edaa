"""A shard of a weight is cast as the whole weight is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from octavo.float8.distributed.fsdp_shards import ShardLayout, cast_shard, reduce_maxima, shard_amax
from octavo.float8.quantize import quantize
from tests.float8.distributed.sharded import (
    RECIPES,
    config,
)
from tests.helpers import ranks


def shards_of(w: Tensor, dim: int, world: int) -> list[Tensor]:
    chunks = list(w.chunk(world, dim))
    return chunks + [w.narrow(dim, 0, 0)] * (world - len(chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("N", "K", "world", "dim"),
    [
        *[(65, 33, world, 0) for world in (1, 2, 3, 4)],
        *[(192 * world, 160, world, 0) for world in (1, 2, 3)],
        *[(rows * 4, 128, 4, 0) for rows in (96, 64, 32)],
        (1000, 300, 3, 0),  # a shard begins inside one block and ends inside another
        (3, 40, 4, 0),  # an empty shard
        (1, 1, 4, 0),
        (40, 192, 2, 1),  # FSDP2 cuts columns only evenly
        (300, 384, 4, 1),
    ],
)
def test_shards_cast_like_the_whole(
    recipe: str, dtype: torch.dtype, N: int, K: int, world: int, dim: int
) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=g)
    w *= 2.0 ** (torch.randint(-6, 6, (N, 1), generator=g) + torch.randint(-6, 6, (1, K), generator=g))
    cast = config(recipe, gather=True).to_recipe().output.b
    layouts = [ShardLayout(N, K, dim, world, rank) for rank in range(world)]
    shards = shards_of(w, dim, world)
    amax = torch.stack([shard_amax(s, at, cast) for s, at in zip(shards, layouts, strict=True)]).amax(0)
    parts = [cast_shard(s.to(dtype), amax, at, cast) for s, at in zip(shards, layouts, strict=True)]
    want = quantize(w.to(dtype), cast)
    gathered = torch.cat([data for data, _ in parts], dim)[:N, :K]
    assert torch.equal(gathered, want.data.contiguous().view(torch.uint8))
    assert all(torch.equal(scale, want.scale) for _, scale in parts)
    assert {tuple(data.shape) for data, _ in parts} == {layouts[0].padded}


def test_maxima_are_reduced_as_numbers() -> None:
    values = torch.tensor([[0.0, 1e-40, 0.5], [torch.inf, torch.nan, -torch.nan]])
    assert ranks.run(2, _reduced, values.tolist()) == [True, True]


def _reduced(values: list[list[float]]) -> bool:
    grids = [torch.tensor(values), torch.tensor([[float(dist.get_rank())]])]
    grids[0][:, dist.get_rank() :: 2] = 0  # each rank has a NaN where the other has a number
    whole, rank = reduce_maxima(grids, [dist.group.WORLD])
    return torch.equal(whole.nan_to_num(-1), torch.tensor(values).nan_to_num(-1)) and rank.item() == 1
