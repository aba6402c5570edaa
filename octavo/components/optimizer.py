"""The optimizer from its config section. Every parameter is in one group: Llama's norms are decayed too,
as in its peers.
"""

import torch
from torch import nn

from octavo.config.schema import Optimizer

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
