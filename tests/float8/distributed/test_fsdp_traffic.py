"""What a step under FSDP2 communicates, reduces and casts."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.float8 import (
    Float8LinearConfig,
    cast_weights_once,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from octavo.float8.distributed.fsdp_gather import sharded_weights
from tests.float8.distributed.sharded import (
    Block,
    config,
    ignore_fsdp_warning,
    linears,
    shard,
)
from tests.float8.graphs import FLOAT8
from tests.helpers import ranks

pytestmark = ignore_fsdp_warning


class Traffic(TorchDispatchMode):
    """Counts collectives, the bytes that a rank receives by all-gather, and casts of shards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shards = {weight.shape for _, weight in sharded_weights(model)}
        self.calls: Counter[str] = Counter()
        self.gathered_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")):
            self.calls[name.split("::")[1].strip("_").replace("all_reduce", "allreduce")] += 1
        if name == "c10d::_allgather_base_":
            self.gathered_bytes += args[0].nbytes
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in FLOAT8 and args[0].dtype not in FLOAT8:
            # A cast in tiles: its last two dimensions needn't be the shard's.
            self.calls["shard casts"] += out.numel() in {shape.numel() for shape in self.shards}
        return out


# Nothing else has as many elements as a shard: neither activations, nor those padded to whole 128-blocks.
SMALL, SMALL_TOKENS = (64, 256, 64, 192), 12
WHOLE_BLOCKS, WHOLE_BLOCKS_TOKENS = (128, 512, 256, 768), 640


def even(
    sizes: tuple[int, ...], cfg: Float8LinearConfig, *, dtype: torch.dtype, checkpointed: bool
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(pair, checkpointed=checkpointed) for pair in pairwise(sizes)))
    for linear in linears(model):
        linear.bias = None
    return shard(convert_to_float8_training(model, config=cfg), dtype=dtype)


def _traffic(
    gather: bool, dtype: torch.dtype, recipe: str, once: bool, precompute: bool, checkpointed: bool
) -> tuple[dict[str, int], int]:
    small = recipe == "tensorwise"
    sizes, tokens = (SMALL, SMALL_TOKENS) if small else (WHOLE_BLOCKS, WHOLE_BLOCKS_TOKENS)
    model = even(sizes, config(recipe, gather=gather), dtype=dtype, checkpointed=checkpointed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def one_step() -> None:
        with cast_weights_once(model) if once else nullcontext():
            for _ in range(3):
                model(torch.randn(tokens, sizes[0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if precompute:
            precompute_float8_dynamic_scale_for_fsdp(model)

    one_step()
    with Traffic(model) as traffic:
        one_step()
    return dict(traffic.calls), traffic.gathered_bytes


def _all_traffic() -> dict[str, Any]:
    fp32, bf16 = torch.float32, torch.bfloat16
    return {
        "fp32": _traffic(False, fp32, "tensorwise", False, False, False),
        "bf16": _traffic(False, bf16, "tensorwise", False, False, False),
        "float8": _traffic(True, bf16, "tensorwise", False, False, False),
        "float8 from fp32": _traffic(True, fp32, "tensorwise", False, False, False),
        "precomputed": _traffic(True, bf16, "tensorwise", False, True, False),
        "once": _traffic(True, bf16, "tensorwise", True, False, False),
        "all": _traffic(True, bf16, "tensorwise", True, True, True),
        "all, blockwise": _traffic(True, bf16, "blockwise", True, True, True),
    }


def test_bytes_reductions_and_casts_of_a_step() -> None:
    first, second = ranks.run(2, _all_traffic)
    assert first == second
    # 3 microbatches, each gathering 3 weights in forward and 3 in backward.
    gathers = 3 * (3 + 3)
    calls = {name: Counter(counts) for name, (counts, _) in first.items()}
    received = {name: total for name, (_, total) in first.items()}
    elements = gathers * sum(K * N for K, N in pairwise(SMALL)) // 3
    assert all(counts["allgather_base"] == gathers for counts in calls.values())
    assert received["fp32"] == 4 * elements
    assert received["bf16"] == 2 * elements
    for name in set(calls) - {"fp32", "bf16", "all, blockwise"}:
        assert received[name] == elements, name

    def reductions_and_casts(name: str) -> tuple[int, int]:
        return calls[name]["allreduce"], calls[name]["shard casts"]

    assert reductions_and_casts("fp32") == (0, 0)
    assert reductions_and_casts("float8") == (gathers, gathers)
    assert reductions_and_casts("precomputed") == (1, gathers)
    assert reductions_and_casts("once") == (1, 3)
    assert reductions_and_casts("all") == (1, 3)
    assert reductions_and_casts("all, blockwise") == (1, 3)
