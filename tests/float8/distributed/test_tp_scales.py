"""A shard of an operand is cast as the whole operand is, bit for bit, and so is a gathered operand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from octavo.float8 import FULL, RECIPES, Cast, ScaleFormat
from octavo.float8.distributed.tp_gather import can_gather, cast_and_gather, gather_tokens, scatter_rows
from octavo.float8.distributed.tp_scales import ShardedAxis, TensorParallelSpec
from octavo.float8.quantize import Quantized, quantize, quantize_both
from tests.helpers import ranks

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CASTS = {
    "tensor": Cast(E4M3, (FULL, FULL)),
    "tensor_pow2": Cast(E4M3, (FULL, FULL), ScaleFormat.POW2),
    "gradient": Cast(E5M2, (FULL, FULL)),
    "row": Cast(E4M3, (1, FULL), ScaleFormat.POW2),
    "column": Cast(E4M3, (FULL, 1)),
    "line": Cast(E4M3, (1, 128)),
    "tile": Cast(E4M3, (128, 128)),
    "mx": Cast(E4M3, (1, 32), ScaleFormat.E8M0),
}


def operand(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Rows and columns of magnitudes that differ by up to 2**16, so that small values underflow."""
    g = torch.Generator().manual_seed(seed)
    row = 2.0 ** torch.randint(-8, 9, (rows, 1), generator=g)
    col = 2.0 ** torch.randint(-8, 9, (1, cols), generator=g)
    return torch.randn(rows, cols, generator=g) * row * col


def group() -> tuple[str, int, int]:
    return dist.group.WORLD.group_name, dist.get_rank(), dist.get_world_size()


def split_casts(name: str, axis: int) -> tuple[bool, bool]:
    cast, x = CASTS[name], operand(512, 1024)
    where, rank, world = group()
    whole = quantize(x, cast)
    part = quantize(x.chunk(world, axis)[rank], cast, ShardedAxis(axis, where))
    scale = whole.scale if cast.block[axis] == FULL else whole.scale.chunk(world, axis)[rank]
    data = whole.data.view(torch.uint8).chunk(world, axis)[rank]
    return torch.equal(part.data.view(torch.uint8), data), torch.equal(part.scale, scale)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", CASTS)
def test_a_part_is_cast_as_the_whole(name: str, axis: int) -> None:
    assert ranks.run(4, split_casts, name, axis) == [(True, True)] * 4


def mine(x: Tensor, pieces: int, world: int, rank: int) -> Tensor:
    """This rank's rows of `x[M, C]`: its part of every piece."""
    return x.view(pieces, world, -1, x.shape[1])[:, rank].reshape(-1, x.shape[1])


def gathered_casts(row: Cast, col: Cast | None, pieces: int, dtype: torch.dtype) -> list[bool]:
    where, rank, world = group()
    x = operand(1024, 96).to(dtype)
    part = mine(x, pieces, world, rank)
    assert can_gather(part.shape[0], pieces, row, col)
    got = cast_and_gather(part, row, col, pieces=pieces, size=world, group=where)
    want = quantize_both(x, row, col)
    same = [(got[1] is None) == (col is None)]
    for ours, theirs in zip(got, want, strict=True):
        if ours is not None:
            assert isinstance(theirs, Quantized)
            same += [
                torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8)),
                torch.equal(ours.scale, theirs.scale),
            ]
    if got[1] is not None and not row.square:  # as products read it: no linear copies it again
        same.append(got[1].data.is_contiguous())
    return same


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_gathered_is_the_cast_of_the_whole(recipe: str, dtype: torch.dtype, pieces: int) -> None:
    row, col = RECIPES[recipe].output.a, RECIPES[recipe].grad_weight.b
    assert row is not None
    for trained in (col, None):
        assert all(all(same) for same in ranks.run(4, gathered_casts, row, trained, pieces, dtype))


def tokens_there_and_back(pieces: int) -> tuple[bool, bool]:
    where, rank, world = group()
    x = torch.arange(24 * 3).view(24, 3)
    odd = x.to(torch.uint8)[:, :1]  # 24 / world bytes, before tensors of eight bytes an element
    part, few = (mine(t, pieces, world, rank) for t in (x, odd))
    whole = gather_tokens([(part, 0), (part.t(), 1), (few, 0)], pieces, world, where)
    back = scatter_rows(x * (rank + 1), pieces, world, where)
    total = sum(range(1, world + 1))
    return (
        torch.equal(whole[0], x) and torch.equal(whole[1], x.t()) and torch.equal(whole[2], odd),
        torch.equal(back, mine(x, pieces, world, rank) * total),
    )


@pytest.mark.parametrize("pieces", [1, 3, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_tokens_keep_their_order(world: int, pieces: int) -> None:
    assert ranks.run(world, tokens_there_and_back, pieces) == [(True, True)] * world


def test_what_can_be_gathered() -> None:
    line, row = CASTS["line"], CASTS["row"]
    assert can_gather(256, 2, line, line)
    assert not can_gather(192, 2, line, line)  # 96 tokens a piece
    assert can_gather(192, 2, line, None)  # blocks along the features only
    assert can_gather(7, 7, row, row)
    assert not can_gather(256, 2, None, None)
    assert not can_gather(0, 0, row, row)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_which_shards_hold_whole_blocks(axis: int, recipe: str) -> None:
    block = {"blockwise": 128, "mxfp8": 32}.get(recipe, 1)
    sharding = TensorParallelSpec(axis, "", 4)
    sharding.check(RECIPES[recipe], 4 * block * 3)
    with pytest.raises(ValueError, match="straddle" if block > 1 else "evenly"):
        sharding.check(RECIPES[recipe], 4 * block * 3 + (block // 2) * 4 if block > 1 else 13)
