"""The optimizer from its config section. Every parameter is in one group: Llama's norms are decayed too,
as in its peers.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from octavo.config.schema import Optimizer
from octavo.distributed.pipeline import over_stages

_CLASSES: dict[str, type[torch.optim.Adam]] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
_IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"fused": False, "foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters of `model` that need gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _CLASSES[settings.name](
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        **_IMPLEMENTATIONS[settings.implementation],
    )


def clip_gradients(model: nn.Module, max_norm: float, pipeline: DeviceMesh | None = None) -> Tensor:
    """Scale the gradients of `model` so that their global norm is `max_norm` at most.

    `pipeline`: the processes that have the other stages of the model. Returns the norm before that, over all
    processes, a scalar that is the same on each.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads and grads[0].device.type == "cpu":
        # A CPU adds up float32 squares one after another, which loses 1e-4 of a large gradient's norm: more
        # than a change of the layout may show.
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
    else:
        norm = nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = over_stages(norm, pipeline)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
