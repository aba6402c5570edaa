"""Builds the optimizers of `octavo/config/optimizers.py`. All parameters are in one group, so weight decay
applies to norms too.
"""

from collections.abc import Iterable, Sequence
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from octavo.config.optimizers import OPTIMIZERS
from octavo.config.schema import Optimizer
from octavo.distributed.pipeline_parallel import over_stages
from octavo.metrics.device import DTYPES

_IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"fused": False, "foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}
_NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer over the parameters of `model` that need gradients."""
    row = OPTIMIZERS[settings.name]
    parameters = [p for p in model.parameters() if p.requires_grad]
    numbers: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    chosen, narrow = row.full, any(p.dtype == torch.bfloat16 for p in parameters)
    if row.low_bit is not None and (row.full is None or narrow or settings.state_dtype != "float32"):
        chosen = row.low_bit
        if row.moment_bytes is None:
            numbers["state_dtype"] = DTYPES[settings.state_dtype]
    else:
        flags = _IMPLEMENTATIONS[settings.implementation]
        numbers |= {flag: on for flag, on in flags.items() if flag in row.implementations}
    assert chosen is not None
    optimizer: torch.optim.Optimizer = resolve_name(chosen)(parameters, **numbers)
    return optimizer


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the gradients of `parameters`, sharded or not: a scalar, and a collective call."""
    return _norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(model: nn.Module, max_norm: float, pipeline: DeviceMesh | None = None) -> Tensor:
    """Scale the gradients of `model` so that their global norm is at most `max_norm`.

    pipeline: the group of processes with the other stages. Returns the norm before clipping over all
    processes, a scalar that is the same on each.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = over_stages(_norm(grads), pipeline)
    _scale(grads, torch.clamp(max_norm / (norm + _NORM_EPS), max=1.0))
    return norm


def _norm(grads: Sequence[Tensor]) -> Tensor:
    if grads and grads[0].device.type == "cpu":
        # A CPU sums float32 squares sequentially, with a relative error of 1e-4 for large gradients, more
        # than a change of the parallel layout may cause.
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
    else:
        norm = nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def _scale(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient by the scalar `factor`, in place on local shards. DTensor would take seconds to
    derive, for hundreds of tensors on a three-axis mesh, that this needs no communication.
    """
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if local:
        torch._foreach_mul_(local, factor)
