"""A lazily read state dict: the shapes of a model's parameters on disk, and a function that reads one.

A model of 70 billion parameters rarely fits a machine's memory, so code that reads, converts or checks models
has only the shapes in memory and reads one tensor at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.checkpoint.reader import Shape, compare_shapes
from octavo.checkpoint.store import summarize
from octavo.config import ConfigError
from octavo.models.init import plain_name


@dataclass(frozen=True)
class Weights:
    """Parameters by octavo's names.

    Attributes:
        where: the file or folder, for messages.
        shapes: of every parameter.
        read: name -> the unsharded tensor on the CPU, in its stored dtype.
    """

    where: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """The shape of each parameter and saved buffer by its name."""
    return {name: tuple(tensor.shape) for name, tensor in saved_tensors(model)}


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and saved buffer of `model`, sharded or not, by its plain name."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter
    for owner, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield plain_name(f"{owner}.{name}"), buffer


def check_fit(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], *, where: str, model: str, remedy: str
) -> None:
    """`ConfigError` that names the first tensors that are missing, unknown, or of another shape."""
    problems = compare_shapes(found, expected, model)
    problems += [f"{name} {found[name]} is not in {model}" for name in found if name not in expected]
    if problems:
        raise ConfigError(f"{where} does not fit {model}: {summarize(problems)}. {remedy}")


def materialize_buffers(model: Any, device: torch.device | str = "cpu") -> None:
    """Allocate and fill the buffers of a model that was built on the meta device, on `device`."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    if hasattr(model, "init_buffers"):
        model.init_buffers()


def read_parameters(
    model: nn.Module, weights: Weights, names: Iterable[str], dtype: torch.dtype, device: torch.device | str
) -> None:
    """Read the parameters `names` into a model that was built on the meta device."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module, value = model.get_submodule(owner), weights.read(name)
        if leaf in module._buffers:
            module._buffers[leaf] = value.to(device=device, dtype=torch.float32)
        else:
            value = value.to(device=device, dtype=dtype)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def load_weights(
    model: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Read all parameters into a model that was built on the meta device, and set it to eval mode."""
    materialize_buffers(model, device)
    read_parameters(model, weights, weights.shapes, dtype, device)
    return model.eval()
