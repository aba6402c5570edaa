"""FSDP2 with given groups and dtypes, and with gradients summed (not averaged) over the ranks.

The trainer divides the loss by the global number of tokens, so the gradients of the ranks are summed. FSDP2
divides by the number of ranks by default; gloo supports no pre-multiplied sum, so the plain sum is forced.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from octavo.distributed.parallelize_plan import FSDPPlan


def shard(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Module]],
    sharding: FSDPPlan,
    *,
    cast_inputs: bool = True,
) -> None:
    """Shard `model` in place. Each group's parameters are gathered together, the rest with the root.

    cast_inputs: cast floating-point inputs of a group to `sharding.param_dtype`. False if inputs have that
    dtype already, except those that must keep theirs.

    The last group stays gathered between forward and backward, because backward starts with it, unless
    `sharding.reshard_last` is set. `model` may be a pipeline stage.
    """
    policy = MixedPrecisionPolicy(param_dtype=sharding.param_dtype, reduce_dtype=sharding.reduce_dtype)
    offload = OffloadPolicy()
    if sharding.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=sharding.mesh.device_type == "cuda")
    shard_fully = partial(fully_shard, mesh=sharding.mesh, mp_policy=policy, offload_policy=offload)
    for group in groups:
        last = group is groups[-1]
        shard_fully(
            list(group),
            mp_policy=replace(policy, cast_forward_inputs=cast_inputs),
            reshard_after_forward=sharding.reshard and (not last or sharding.reshard_last),
        )
    shard_fully(model, reshard_after_forward=sharding.reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
