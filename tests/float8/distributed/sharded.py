"""Chains of linears of odd sizes under FSDP2, on forked gloo ranks: built, sharded, trained and compared.

Runs are compared on each rank, so that only verdicts are returned.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint

from octavo.float8 import (
    Float8LinearConfig,
    cast_weights_once,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)

# FSDP2 warns at its first use.
ignore_fsdp_warning = pytest.mark.filterwarnings("ignore:.*reshard_after_forward=1.*:UserWarning")

WORLDS = [1, 2, 3, 4]
RECIPES = ["tensorwise", "tensorwise, powers of two", "blockwise"]


def config(recipe: str, *, gather: bool) -> Float8LinearConfig:
    name, _, pow2 = recipe.partition(", ")
    return replace(
        Float8LinearConfig.from_recipe_name(name),
        round_scales_to_power_of_2=bool(pow2),
        enable_fsdp_float8_all_gather=gather,
        emulate=True,
    )


# Sizes that nothing divides; 128-blocks that straddle shards of 192, 96, 64 and 48 rows; fewer rows than
# ranks.
SIZES = (33, 65, 192, 3)


class Block(nn.Module):
    def __init__(self, sizes: tuple[int, ...], *, checkpointed: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, N) for K, N in pairwise(sizes))
        self.checkpointed = checkpointed

    def run(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x).relu()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def build(recipe: str, *, gather: bool, scaled: bool = False, checkpointed: bool = False) -> nn.Module:
    """A chain of linears. `scaled`: rows and columns of the weights times random powers of two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(sizes, checkpointed=checkpointed) for sizes in (SIZES[:3], SIZES[2:])))
    if scaled:
        for linear in linears(model):
            N, K = linear.weight.shape
            linear.weight.data *= 2.0 ** (torch.randint(-6, 6, (N, 1)) + torch.randint(-6, 6, (1, K)))
    return convert_to_float8_training(model, config=config(recipe, gather=gather))


def shard(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = torch.float32,
    reshard: bool | int = True,
    offload: OffloadPolicy | None = None,
) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in [*model, model]:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            offload_policy=offload or OffloadPolicy(),
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo has no average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def step(
    model: nn.Module, optimizer: Any, seed: int, *, once: bool = False, precompute: bool = False
) -> list[Tensor]:
    """One optimizer step of two microbatches: outputs, gradients of inputs, gradients of weights."""
    kept = []
    with cast_weights_once(model) if once else nullcontext():
        for microbatch in range(2):
            g = torch.Generator().manual_seed(1000 * seed + 10 * microbatch + dist.get_rank())
            x = torch.randn(16, SIZES[0], generator=g).requires_grad_()
            y = model(x)
            y.float().square().mean().backward()
            kept += [y.detach(), x.grad]
    kept += [p.grad.full_tensor() for p in model.parameters()]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if precompute:
        precompute_float8_dynamic_scale_for_fsdp(model)
    return kept


def fused(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def train(model: nn.Module, *, steps: int = 2, **how: bool) -> list[Tensor]:
    optimizer = fused(model)
    kept = [t for seed in range(steps) for t in step(model, optimizer, seed, **how)]
    return kept + [p.full_tensor().detach() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
