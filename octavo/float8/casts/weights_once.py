"""Weights change once per optimizer step, so they are cast once per optimizer step.

Without this, every microbatch casts every weight, and activation checkpointing casts it again.
`cast_weights_once` is a scope around all microbatches of a step, forward and backward, but not the
optimizer's step:

    with cast_weights_once(model):
        for microbatch in step:
            loss(model(microbatch)).backward()
    optimizer.step()

Inside, each float8 linear keeps its weight's casts (`weight_cache.py`): one byte per parameter for square
casts (tensorwise, blockwise), two for the others and for kernels, which write the transpose out. Both casts
are made together, so that a kernel reads the weight twice where separate casts in forward and backward read
it four times. Weights that are multiplied together are cast into one buffer. Compiled code takes the casts as
inputs, so entering the scope compiles one more graph.

Under FSDP2, weights gathered in float8 keep the cast of the local shard. Weights gathered in high precision
are cast at every use, since their casts would keep the whole model on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from octavo.float8.casts.operands import cast_weight
from octavo.float8.distributed.dtensor_io import tensor_parallel_spec
from octavo.float8.distributed.fsdp_gather import cast_shards_once
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.linear import Float8Linear


@contextmanager
def cast_weights_once(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Cast each float8 weight of `model` now, and use that cast until the scope ends.

    Raises RuntimeError for an optimizer step on one of these weights inside the scope, which would make the
    casts stale. Editing a weight by hand inside it may go unnoticed. `enabled=False` does nothing, with the
    same results.
    """
    linears = [m for m in model.modules() if isinstance(m, Float8Linear)] if enabled else []
    if any(linear.weight_cache.active for linear in linears):
        raise RuntimeError("cast_weights_once is already active for this model")
    weights = {id(linear.weight) for linear in linears}

    def forbid(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in weights for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "an optimizer step inside cast_weights_once: the next microbatch would use the old weights. "
                "Leave the scope before optimizer.step(), and enter a new one after it"
            )

    with ExitStack() as stack:
        if linears:
            stack.callback(register_optimizer_step_pre_hook(forbid).remove)
            stack.enter_context(cast_shards_once(model))
        for linear in linears:
            stack.callback(linear.weight_cache.clear)
        with torch.no_grad():
            for group in {id(m.shared_input): m.shared_input for m in linears if m.shared_input}.values():
                if set(group.linears) <= set(linears):  # not if `model` is only a part of it
                    stack.callback(group.release_joined_casts)
                    group.cast_joined_weights()
            for linear in linears:
                _cast_weight(linear)
        yield


def _cast_weight(linear: Float8Linear) -> None:
    """Make the casts of `linear`'s weight usable, unless it is gathered or computed at each use."""
    weight, sharded = linear.weight, None
    if isinstance(weight, DTensor):
        if not linear.tensor_parallel or weight.device_mesh.ndim != 1:  # FSDP's
            return
        sharded = tensor_parallel_spec(weight, linear.recipe).weight
        weight = weight.to_local()
    if isinstance(weight, UnshardedWeight):  # gathered in float8, so it has casts
        return
    if not isinstance(linear.weight, nn.Parameter):  # computed, e.g. by weight_norm
        return
    cache = linear.weight_cache
    if not cache.is_current(linear.weight):
        casts = cast_weight(weight.detach(), linear.recipe, for_grad_input=True, sharded=sharded)
        cache.store(linear.weight, casts)
    cache.active = True
