"""DDP: every process has the whole model and its own data; gradients are summed over all processes.

The precision selects one of two mechanisms. With bfloat16 compute, parameters must be cast for each layer,
which FSDP2 does: over a mesh of N replicas of one shard it gathers nothing, and all-reduces one bucket per
layer. In float32 no wrapper is needed; the `Buckets` below reduce gradients during backward.

PyTorch's DistributedDataParallel is not used because it averages, while the trainer has already divided the
loss by the global number of tokens; and because it reorders its buckets after the first step, so that with
three or more processes a resumed run would sum in another order than an uninterrupted one.

Either way, gradients are reduced once per step, after its last microbatch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule

from octavo.distributed.parallelize_plan import Replicas

_BUCKET_BYTES = 25 * 2**20  # DDP's default: large enough for the network, small enough to start early


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    missing: int = 0
    sums: Tensor | None = None
    work: dist.Work | None = None

    def assign(self, flat: Tensor) -> None:
        """Make the gradients views of `flat`, if it has the parameters' dtype."""
        with_grad = [p for p in self.parameters if p.grad is not None]
        if flat.dtype is with_grad[0].dtype:
            for parameter, grad in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
                parameter.grad = grad.view_as(parameter)


def _cut(parameters: Iterable[nn.Parameter]) -> list[_Bucket]:
    """Fill buckets of at most `_BUCKET_BYTES` with `parameters`, in their order."""
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

    Buckets are in reverse order of forward, in which gradients usually arrive. reduces: whether the next
    backward reduces the gradients, including those accumulated before; set it before that backward.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], replicas: Replicas) -> None:
        self.reduces = True
        self._replicas = replicas
        self._buckets = _cut(reversed([p for p in parameters if p.requires_grad]))
        self._of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._next: int | None = None  # index of the bucket to reduce next; None outside a reducing backward
        for parameter in self._of:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, parameter: Tensor) -> None:
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
        """Start the all-reduce of `bucket`; every replica does this in the same order."""
        grads = [p.grad.flatten() for p in bucket.parameters if p.grad is not None]
        if grads:
            bucket.sums = torch.cat(grads).to(self._replicas.reduce_dtype)
            bucket.assign(bucket.sums)  # frees the gradients' separate memory during backward
            group = self._replicas.mesh.get_group()
            bucket.work = dist.all_reduce(bucket.sums, group=group, async_op=True)

    def _finish(self) -> None:
        """Wait for all reductions at the end of backward, and store the sums as gradients."""
        assert self._next is not None
        for bucket in self._buckets[self._next :]:  # buckets with parameters without a gradient
            self._reduce(bucket)
        self._next = None
        for bucket in self._buckets:
            if bucket.work is None or bucket.sums is None:
                continue
            bucket.work.wait()
            bucket.assign(bucket.sums.to(bucket.parameters[0].dtype))
            bucket.sums = bucket.work = None


_NAME = "gradient_buckets"


def replicate_model(model: nn.Module, replicas: Replicas) -> None:
    """Sum the gradients of `model` over `replicas`. Its parameters may still be on the meta device."""
    setattr(model, _NAME, replicas)


def reduce_gradients_now(model: nn.Module, *, last: bool) -> None:
    """Call before each microbatch: gradients are all-reduced over replicas only after the `last` of a step.

    Sharded gradients are reduce-scattered after every microbatch, so that only shards are kept.
    """
    buckets = getattr(model, _NAME, None)
    if isinstance(buckets, Replicas):  # created here because allocation replaces meta parameters
        buckets = Buckets(list(model.parameters()), buckets)
        setattr(model, _NAME, buckets)
    if isinstance(buckets, Buckets):
        buckets.reduces = last
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
