"""FSDP2 as the trainer uses it: given groups, given dtypes, and gradients that are sums over the ranks.

The trainer divides the loss by the global number of tokens, so ranks' gradients add up and nothing is
averaged. FSDP2 by itself divides by the number of ranks; on gloo it knows no pre-multiplied sum, so there
the plain sum is forced.
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
    """Shard `model` in place: each group's parameters are gathered together, the rest with the root.

    cast_inputs: what a group is called with becomes `sharding.param_dtype`, every tensor of real numbers.
    False where inputs have that dtype anyway, but for those that must keep theirs.

    The last group stays gathered between forward and backward, because backward begins with it; unless
    `reshard_last` asks for its memory in between. `model` may be a stage of a pipeline.
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
