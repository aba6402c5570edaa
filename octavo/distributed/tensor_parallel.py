"""What of tensor parallelism lies outside a model's layers: logits that stay sharded by vocabulary, and their
loss.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.parallel import loss_parallel

from octavo.distributed.plan import TensorParallel


def lay_logits(model: nn.Module, plan: TensorParallel, layout: Placement) -> None:
    """Make logits that are a DTensor come out of `model` as `layout`; whole, where the loss is not
    parallel.
    """

    def lay(module: nn.Module, args: Any, logits: Any) -> Any:
        if not isinstance(logits, DTensor):
            return logits
        return logits.redistribute(placements=[layout]) if plan.loss_parallel else logits.full_tensor()

    model.register_forward_hook(lay)


def loss_context(*, parallel: bool) -> AbstractContextManager[None]:
    """The scope of forward, loss and backward in which sharded logits may be given to cross entropy."""
    return loss_parallel() if parallel else nullcontext()
