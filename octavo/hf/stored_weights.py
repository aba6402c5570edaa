"""The parameters of a model that lie on disk, one at a time.

A model of 70 billion parameters fits a disk and seldom a machine's memory, so what reads, converts and checks
models holds the list of shapes, and asks for each tensor when it is its turn.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.config import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """Parameters by octavo's names.

    where: the file or folder, for messages. shapes: every parameter's. read: name -> the whole tensor on the
    CPU, in the dtype that is stored.
    """

    where: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """The shape of each parameter by its plain name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_fit(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], *, where: str, model: str, remedy: str
) -> None:
    """`ConfigError` that names the first three tensors that are missing, misshapen or of another model."""
    wrong = [f"{name} is not in it" for name in expected if name not in found]
    wrong += [
        f"{name} is {found[name]} in it and {shape} in {model}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"{name} {found[name]} has no place in {model}" for name in found if name not in expected]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(f"{where} does not fit {model}: {'; '.join(wrong[:3])}{more}. {remedy}")


def allocate(model: Any, device: torch.device | str = "cpu") -> None:
    """Give the buffers of a model that was built on the meta device their values, on `device`."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    if hasattr(model, "init_buffers"):
        model.init_buffers()


def place(
    model: nn.Module, weights: Weights, names: Iterable[str], dtype: torch.dtype, device: torch.device | str
) -> None:
    """Read the parameters called `names` into a model that was built on the meta device."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        value = weights.read(name).to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def load(model: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Read all parameters into a model that was built on the meta device; it is ready to evaluate."""
    allocate(model, device)
    place(model, weights, weights.shapes, dtype, device)
    return model.eval()
