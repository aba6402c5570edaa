"""Replicas: every process has the whole model and other data, and gradients are summed over all of them.

Two mechanisms, and the precision decides. In float32 it is PyTorch's `DistributedDataParallel`, in its
composable form, which leaves the parameters' names alone: gradients are gathered into buckets, and a full
bucket is reduced while backward goes on. Where the compute is in bfloat16, parameters are cast for each layer
anyway, which is FSDP2's work: over a mesh of N replicas of one shard it gathers nothing, and all-reduces one
bucket a layer.

Both sum: the trainer has divided the loss by the global number of tokens. DDP would average; a communication
hook in place of its own leaves the division out. And both wait with the reduction for a step's last
microbatch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import DDP, replicate
from torch.distributed.fsdp import FSDPModule

from octavo.distributed.plan import Replicas

_BUCKET_MB = 25


def _sum(replicas: Replicas, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum of a bucket over the replicas, in the type asked for."""
    grads = bucket.buffer()
    sums = grads.to(replicas.reduce_dtype)
    work = dist.all_reduce(sums, group=replicas.mesh.get_group(), async_op=True)

    def in_place(done: torch.futures.Future[Any]) -> Tensor:
        return grads.copy_(done.value()[0])

    future: torch.futures.Future[Tensor] = work.get_future().then(in_place)
    return future


def replicate_model(model: nn.Module, replicas: Replicas) -> None:
    """Sum the gradients of `model`'s whole parameters over `replicas`, in place."""
    import torch._dynamo.config as dynamo

    # It would split compiled code at the buckets' ends, for models compiled whole; ours are by layer.
    dynamo.optimize_ddp = False
    replicate(
        model,
        process_group=replicas.mesh.get_group(),
        bucket_cap_mb=_BUCKET_MB,
        gradient_as_bucket_view=True,
    )
    assert isinstance(model, DDP)
    model.register_comm_hook(replicas, _sum)


def reduce_gradients_now(model: nn.Module, *, last: bool) -> None:
    """Say before a microbatch's forward whether it is the `last` of its step, so that replicas' gradients are
    reduced after it. Gradients that are sharded are scattered after every microbatch, to keep only shards.
    """
    if isinstance(model, DDP):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
