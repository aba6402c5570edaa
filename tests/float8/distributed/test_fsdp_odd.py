"""Unusual cases of a float8 gather: fewer ranks, tied weights, policies, copies, non-finite numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    fully_shard,
)

from octavo.float8 import (
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from octavo.float8.distributed.fsdp_gather import sharded_weights
from tests.float8.distributed.sharded import (
    SIZES,
    build,
    config,
    fused,
    ignore_fsdp_warning,
    linears,
    same,
    shard,
)
from tests.helpers import ranks

pytestmark = ignore_fsdp_warning


def _message(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _resharded_to_fewer() -> str:
    model = shard(build("tensorwise", gather=True), reshard=2)
    return _message(lambda: model(torch.randn(4, SIZES[0])))


def test_resharding_to_fewer_ranks_is_refused() -> None:
    for message in ranks.run(4, _resharded_to_fewer):
        assert message.startswith("ValueError: reshard_after_forward is a number of ranks")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.output = nn.Linear(32, 48, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens))


def _tied() -> bool:
    results = []
    for gather in (False, True):
        torch.manual_seed(0)
        model = convert_to_float8_training(Tied(), config=config("tensorwise", gather=gather))
        fully_shard(model)
        optimizer = fused(model)
        for _ in range(2):
            model(torch.arange(12)).sum().backward()
            optimizer.step()
        results.append([model.embedding.weight.full_tensor(), model.embedding.weight.grad.full_tensor()])
        assert model.embedding.weight is model.output.weight
    return same(*results)


@pytest.mark.filterwarnings("ignore:.*view tensor.*:UserWarning")
def test_tied_weights_stay_tied_and_are_gathered_whole() -> None:
    assert ranks.run(2, _tied) == [True, True]


def _odd_policies() -> list[bool]:
    def results(gather: bool) -> list[list[Tensor]]:
        # With fewer than 16 tokens, the order in which emulation's products are summed depends on strides.
        x = torch.randn(16, SIZES[0], generator=torch.Generator().manual_seed(0))
        half = build("tensorwise", gather=gather)
        linears(half)[0].weight.requires_grad_(False)
        half = shard(half, dtype=torch.float16)
        autocast = shard(build("tensorwise", gather=gather), dtype=None)
        offloaded = shard(build("blockwise", gather=gather), offload=CPUOffloadPolicy(pin_memory=False))
        precompute_float8_dynamic_scale_for_fsdp(offloaded)
        kept = []
        for model in (half, autocast, offloaded):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model is autocast):
                y = model(x)
            y.sum().backward()
            grads = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
            kept.append([y.detach(), *grads])
        assert [len(k) for k in kept] == [6, 7, 7]
        assert [k[0].dtype for k in kept] == [torch.float16, torch.bfloat16, torch.float32]
        return kept

    return [same(a, b) for a, b in zip(results(True), results(False), strict=True)]


def test_half_precision_frozen_autocast_and_offloaded() -> None:
    assert ranks.run(2, _odd_policies) == [[True] * 3] * 2


def _copied() -> list[bool]:
    model = shard(build("tensorwise", gather=True))
    precompute_float8_dynamic_scale_for_fsdp(model)
    p, weight = sharded_weights(model)[0]
    copied = copy.deepcopy(p)
    with torch.no_grad():
        copied.mul_(2)
    return [torch.equal(copied.full_tensor(), 2 * p.full_tensor()), weight.cache.amax is not None]


def test_a_copy_of_a_parameter_is_its_own() -> None:
    assert ranks.run(2, _copied) == [[True, True]] * 2
    model = copy.deepcopy(build("tensorwise", gather=True))
    assert all(type(linear.weight) is nn.Parameter for linear in linears(model))


def _not_a_number() -> list[bool]:
    verdicts = []
    for bad in (torch.nan, torch.inf):
        for precompute in (False, True):
            model = shard(build("blockwise", gather=True))
            with torch.no_grad():
                for p, weight in sharded_weights(model):
                    if dist.get_rank() == 0 and p.shape[0] == SIZES[2]:
                        weight[0, 0] = bad
            if precompute:
                precompute_float8_dynamic_scale_for_fsdp(model)
            verdicts.append(not model(torch.randn(4, SIZES[0])).isfinite().all().item())
    return verdicts


def test_bad_numbers_are_seen_on_every_rank() -> None:
    assert ranks.run(2, _not_a_number) == [[True] * 4] * 2
