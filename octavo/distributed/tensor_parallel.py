"""What of tensor parallelism lies outside a model's layers: logits that stay sharded by vocabulary, their
loss, and the compiler's setting that overlaps gathers with products.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.parallel import loss_parallel

from octavo.distributed.parallelize_plan import TensorParallel


def lay_logits(model: nn.Module, plan: TensorParallel, layout: Placement) -> None:
    """Make logits that are a DTensor come out of `model` as `layout`; whole, where the loss is not
    parallel.
    """

    def lay(module: nn.Module, args: Any, logits: Any) -> Any:
        if not isinstance(logits, DTensor):
            return logits
        return logits.redistribute(placements=[layout]) if plan.loss_parallel else logits.full_tensor()

    model.register_forward_hook(lay)


def settle(module: nn.Module) -> None:
    """Make what `module` puts out wait for its communication, by a copy.

    A style's output is a tensor that is still on its way. Code compiled with PyTorch 2.13 takes such a tensor
    for an ordinary one, and its backward then hands a wrong gradient, or none, back to the style.
    """
    module.register_forward_hook(lambda module, args, output: output.clone())


def loss_context(*, parallel: bool) -> AbstractContextManager[None]:
    """The scope of forward, loss and backward in which sharded logits may be given to cross entropy."""
    return loss_parallel() if parallel else nullcontext()


def overlap_products(plan: TensorParallel) -> None:
    """Let inductor split a gather and the product that waits for it (or a product and the scattering of its
    sum) into pieces that overlap, in all layers compiled from now on.

    The pieces go through symmetric memory, which GPUs that see each other's memory have.
    """
    import torch._inductor.config as inductor

    inductor._micro_pipeline_tp = True
    enable = symmetric_memory.enable_symm_mem_for_group
    if not hasattr(enable, "__deprecated__"):  # later torch does it by itself
        enable(plan.mesh.get_group().group_name)
