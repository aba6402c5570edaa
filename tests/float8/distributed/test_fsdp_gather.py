"""Gathered in float8 equals gathered in high precision, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
)

from octavo.float8 import (
    Float8Linear,
    cast_weights_once,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from octavo.float8.distributed.fsdp_gather import ShardedWeight, sharded_weights
from tests.float8.distributed.sharded import (
    SIZES,
    WORLDS,
    Block,
    build,
    config,
    ignore_fsdp_warning,
    same,
    shard,
    train,
)
from tests.float8.graphs import WITHOUT_CODE, compiles
from tests.helpers import ranks

pytestmark = ignore_fsdp_warning


@dataclass(frozen=True)
class Variant:
    """One way to train with a float8 gather, which must not differ from gathering high precision."""

    name: str
    reshard: bool = True
    once: bool = False
    precompute: bool = False
    checkpointed: bool = False


PLAIN = Variant("plain")
ALL_AT_ONCE = Variant("once, precomputed, checkpointed", once=True, precompute=True, checkpointed=True)
EACH = [
    PLAIN,
    Variant("not resharded", reshard=False),
    Variant("precomputed", precompute=True),
    Variant("once", once=True),
    Variant("checkpointed", checkpointed=True),
]
CASES = [
    ("tensorwise", torch.float32, True, [PLAIN, ALL_AT_ONCE]),
    ("tensorwise", torch.bfloat16, True, [PLAIN]),
    ("tensorwise, powers of two", torch.bfloat16, False, [ALL_AT_ONCE]),
    ("blockwise", torch.float32, False, [PLAIN]),
    ("blockwise", torch.bfloat16, True, EACH),
]


def _differing() -> list[str]:
    different = []
    for recipe, dtype, scaled, variants in CASES:
        want = train(shard(build(recipe, gather=False, scaled=scaled), dtype=dtype))
        for v in variants:
            model = build(recipe, gather=True, scaled=scaled, checkpointed=v.checkpointed)
            model = shard(model, dtype=dtype, reshard=v.reshard)
            if not same(train(model, once=v.once, precompute=v.precompute), want):
                different.append(f"{recipe} {dtype}: {v.name}")
            assert len(sharded_weights(model)) == len(SIZES) - 1
    return different


@pytest.mark.parametrize("world", WORLDS)
def test_gathered_equals_ungathered(world: int) -> None:
    assert ranks.run(world, _differing) == [[]] * world


def test_float8_training_is_not_high_precision() -> None:
    """The comparisons above would hold for linears that are not float8 at all."""
    torch.manual_seed(0)
    x = torch.randn(16, SIZES[0])
    float8, high = build("blockwise", gather=True), nn.Sequential(*build("blockwise", gather=True))
    for module in list(high.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Float8Linear):
                plain = nn.Linear(child.in_features, child.out_features)
                plain.load_state_dict(child.state_dict())
                setattr(module, name, plain)
    assert not torch.equal(float8(x), high(x))


def reshard_all(*models: nn.Module) -> None:
    """What backward does at its end."""
    for module in chain(*(model.modules() for model in models)):
        if isinstance(module, FSDPModule):
            module.reshard()


def _without_precompute_after_a_step() -> list[bool]:
    verdicts = []
    want = train(shard(build("blockwise", gather=True)), steps=3)
    model = shard(build("blockwise", gather=True))
    precompute_float8_dynamic_scale_for_fsdp(model)  # and never again
    verdicts.append(same(train(model, steps=3), want))

    # Written by hand, by state dict, by .data: each time the next gather must see it.
    def writes(model: nn.Module) -> list[Any]:
        parameters = [p for p in model.parameters() if p.dim() == 2]
        doubled = {name: value * 2 for name, value in model.state_dict().items()}
        return [
            lambda: [torch.no_grad()(p.mul_)(3) for p in parameters],
            lambda: [p.data.mul_(0.25) for p in parameters],
            lambda: [p.detach().add_(1) for p in parameters],
            lambda: model.load_state_dict(doubled),
            lambda: torch._foreach_mul_([p.detach() for p in parameters], 8.0),
            lambda: torch._foreach_copy_(
                [p.to_local().detach() for p in parameters],
                [torch.ones_like(p.to_local()) * 5 for p in parameters],
            ),
        ]

    x = torch.randn(4, SIZES[0], generator=torch.Generator().manual_seed(0))
    model, other = shard(build("blockwise", gather=True)), shard(build("blockwise", gather=False))
    for write, write_other in zip(writes(model), writes(other), strict=True):
        precompute_float8_dynamic_scale_for_fsdp(model)
        write()
        write_other()
        with torch.no_grad():
            verdicts.append(torch.equal(model(x), other(x)))
        reshard_all(model, other)

    with cast_weights_once(model), torch.no_grad():  # by hand, among a step's microbatches
        for factor in (1.0, 3.0):
            for m in (model, other):
                for p in m.parameters():
                    p.mul_(factor)
            verdicts.append(torch.equal(model(x), other(x)))
            reshard_all(model, other)

    precompute_float8_dynamic_scale_for_fsdp(model)
    for _, weight in sharded_weights(model):
        weight.plain.mul_(2)
    try:
        model(x)
    except RuntimeError as error:
        verdicts.append("through an alias" in str(error))
    precompute_float8_dynamic_scale_for_fsdp(model)
    model(x)
    return verdicts


def test_scales_are_never_older_than_the_weights() -> None:
    verdicts = ranks.run(2, _without_precompute_after_a_step)
    assert verdicts == [[True] * 10] * 2


def _compiled(code: bool) -> list[str]:
    """A block compiled in one graph, then sharded; against the same in eager mode. `code`: on one rank it is
    compiled into code, on the other into the same graphs without it.
    """
    backend = "inductor" if code and dist.get_rank() == 0 else WITHOUT_CODE
    runs: dict[str, list[Tensor]] = {}
    for name in ("eager", "compiled", "compiled, once"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(Block((64, 192, 64), checkpointed=False))
        convert_to_float8_training(model, config=config("tensorwise", gather=True))
        if name != "eager":
            model[0].compile(fullgraph=True, backend=backend)
        shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        runs[name] = []
        for seed in range(2):
            with cast_weights_once(model) if name == "compiled, once" else nullcontext():
                for microbatch in range(2):
                    g = torch.Generator().manual_seed(10 * seed + microbatch)
                    x = torch.randn(32, 64, generator=g).requires_grad_()
                    y = model(x)
                    y.square().mean().backward()
                    runs[name] += [y.detach(), x.grad]
            optimizer.step()
            optimizer.zero_grad()
        runs[name] += [p.full_tensor().detach() for p in model.parameters()]
        assert any(isinstance(state, ShardedWeight) for _, state in sharded_weights(model))
    return [name for name, kept in runs.items() if not same(kept, runs["eager"])]


@compiles
@pytest.mark.parametrize("code", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_block_equals_the_eager_one(code: bool) -> None:
    assert ranks.run(2, _compiled, code) == [[], []]
