"""DDP: every process has the whole model and other data, and gradients are summed over all of them.

Two mechanisms, and the precision decides. Where the compute is in bfloat16, parameters are cast for each
layer anyway, which is FSDP2's work: over a mesh of N replicas of one shard it gathers nothing, and
all-reduces one bucket a layer. In float32 nothing needs a wrapper, and gradients are reduced as they come, by
the `Buckets` below, while backward goes on.

Why not PyTorch's DistributedDataParallel: it averages, where the trainer has divided the loss by the global
number of tokens; and after its first step it sorts the buckets anew, so that from three processes on a
resumed run would add up in another order than one that went on. Here buckets are the same from the start.

Either way a step's gradients are reduced once, after its last microbatch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule

from octavo.distributed.parallelize_plan import Replicas

_BUCKET_BYTES = 25 * 2**20  # as DDP's: large enough for the network, small enough to begin early


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    missing: int = 0
    sums: Tensor | None = None
    work: dist.Work | None = None

    def give(self, flat: Tensor) -> None:
        """Let the gradients be parts of `flat`, if it has the parameters' type."""
        having = [p for p in self.parameters if p.grad is not None]
        if flat.dtype is having[0].dtype:
            for parameter, grad in zip(having, flat.split([p.numel() for p in having]), strict=True):
                parameter.grad = grad.view_as(parameter)


def _cut(parameters: Iterable[nn.Parameter]) -> list[_Bucket]:
    """In the order in which their gradients are likely to come: the reverse of forward."""
    buckets, space = [], 0
    for parameter in parameters:
        if parameter.nbytes > space:
            buckets.append(_Bucket([]))
            space = _BUCKET_BYTES
        buckets[-1].parameters.append(parameter)
        space -= parameter.nbytes
    return buckets


class Buckets:
    """Sums the gradients of `parameters` over `replicas` during backward.

    reduces: whether the next backward's gradients, with those that have piled up, are summed; set before it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], replicas: Replicas) -> None:
        self.reduces = True
        self._replicas = replicas
        self._buckets = _cut(reversed([p for p in parameters if p.requires_grad]))
        self._of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._next: int | None = None  # the bucket that is reduced next; None outside a backward that reduces
        for parameter in self._of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: Tensor) -> None:
        if not self.reduces:
            return
        if self._next is None:
            self._next = 0
            for bucket in self._buckets:
                bucket.missing = len(bucket.parameters)
            Variable._execution_engine.queue_callback(self._finish)
        assert isinstance(parameter, nn.Parameter)
        self._of[parameter].missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._reduce(self._buckets[self._next])
            self._next += 1

    def _reduce(self, bucket: _Bucket) -> None:
        """Begin with one, in the same order on every replica."""
        grads = [p.grad.flatten() for p in bucket.parameters if p.grad is not None]
        if grads:
            bucket.sums = torch.cat(grads).to(self._replicas.reduce_dtype)
            bucket.give(bucket.sums)  # frees the gradients' own memory now, not after backward
            group = self._replicas.mesh.get_group()
            bucket.work = dist.all_reduce(bucket.sums, group=group, async_op=True)

    def _finish(self) -> None:
        """At the end of backward: the sums take the gradients' places."""
        assert self._next is not None
        for bucket in self._buckets[self._next :]:  # those with parameters that got no gradient
            self._reduce(bucket)
        self._next = None
        for bucket in self._buckets:
            if bucket.work is None or bucket.sums is None:
                continue
            bucket.work.wait()
            bucket.give(bucket.sums.to(bucket.parameters[0].dtype))
            bucket.sums = bucket.work = None


_NAME = "gradient_buckets"


def replicate_model(model: nn.Module, replicas: Replicas) -> None:
    """Sum the gradients of `model`'s whole parameters over `replicas`; they need not have memory yet."""
    setattr(model, _NAME, replicas)


def reduce_gradients_now(model: nn.Module, *, last: bool) -> None:
    """Say before a microbatch whether it is the `last` of its step, so that replicas' gradients are reduced
    after it. Gradients that are sharded are scattered after every microbatch, to keep only shards.
    """
    buckets = getattr(model, _NAME, None)
    if isinstance(buckets, Replicas):  # only now: parameters that got memory since are new objects
        buckets = Buckets(list(model.parameters()), buckets)
        setattr(model, _NAME, buckets)
    if isinstance(buckets, Buckets):
        buckets.reduces = last
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
