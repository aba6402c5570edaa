"""The parts of tensor parallelism outside a model's layers: logits sharded by vocabulary, their loss, and the
compiler setting that overlaps gathers with matrix products.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.parallel import loss_parallel

from octavo.distributed.parallelize_plan import TensorParallel


def lay_logits(model: nn.Module, plan: TensorParallel, layout: Placement) -> None:
    """Redistribute the DTensor logits of `model` to `layout`, or gather them if the loss is not parallel."""

    def lay(module: nn.Module, args: Any, logits: Any) -> Any:
        if not isinstance(logits, DTensor):
            return logits
        return logits.redistribute(placements=[layout]) if plan.loss_parallel else logits.full_tensor()

    model.register_forward_hook(lay)


def settle(module: nn.Module) -> None:
    """Copy the output of `module`, which waits for its communication.

    A style returns an asynchronous collective tensor. Code compiled with PyTorch 2.13 treats it as an
    ordinary tensor, and its backward then returns a wrong gradient, or none, to the style.
    """
    module.register_forward_hook(lambda module, args, output: output.clone())


def loss_context(*, parallel: bool) -> AbstractContextManager[None]:
    """The scope of forward, loss and backward in which cross entropy accepts sharded logits."""
    return loss_parallel() if parallel else nullcontext()


def overlap_products(plan: TensorParallel) -> None:
    """Let inductor split an all-gather and its GEMM (or a GEMM and its reduce-scatter) into pieces that
    overlap, in all layers compiled from now on.

    This uses symmetric memory, so the GPUs must be able to access each other's memory.
    """
    import torch._inductor.config as inductor

    inductor._micro_pipeline_tp = True
    enable = symmetric_memory.enable_symm_mem_for_group
    if not hasattr(enable, "__deprecated__"):  # newer torch enables it automatically
        enable(plan.mesh.get_group().group_name)
