"""How precise a model's gradients are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def watched(model: nn.Module, x: Tensor, layers: int) -> dict[str, Tensor]:
    """The gradients that precision is judged by, in float32: of the input, and of the linears of the first
    and the last of `layers`.
    """
    ends = ("layers.0.", f"layers.{layers - 1}.")
    found = {"x": x.grad.float()} if x.grad is not None else {}
    for name, p in model.named_parameters():
        if p.grad is not None and p.dim() == 2 and name.startswith(ends):
            found[name] = p.grad.float()
    return found


def sqnr(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """Mean over tensors of 10 log10(|want|^2 / |want - got|^2), in dB."""
    values = []
    for name, a in want.items():
        noise = (a.double() - got[name].double()).square().sum().clamp(min=1e-300)
        values.append(10 * torch.log10(a.double().square().sum() / noise).item())
    return sum(values) / len(values)
