"""What tensor parallelism needs besides torch's styles: logits sharded by vocabulary, their loss, parameters
of modules that compute with local tensors, and the compiler setting that overlaps gathers with products.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, loss_parallel

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


class ShardedParameters(ParallelStyle):
    """Shards the named parameters of a module that computes with local tensors (`local_part`)."""

    def __init__(self, **placements: Placement):
        super().__init__()
        self._placements = placements

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, placement in self._placements.items():
            whole = module.get_parameter(name)
            sharded = distribute_tensor(whole, device_mesh, [placement], src_data_rank=None)
            setattr(module, name, nn.Parameter(sharded, whole.requires_grad))
        return module


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter. Processes that have the same part add up their gradients."""
    if not isinstance(parameter, DTensor):
        return parameter
    summed = [Partial() if placement.is_replicate() else placement for placement in parameter.placements]
    return parameter.to_local(grad_placements=summed)


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
