"""Initial weights as a function of (seed, parameter name).

Each parameter has a random stream of its own, seeded by a hash of the run's seed and its name. Every
process draws the whole parameter and keeps its shard: so the start of a run depends neither on the number
of processes nor on the order of initialisation, nor on which layers a process holds. It costs each process
the drawing of all values, and the memory of the largest single parameter for a moment. A CPU and a GPU draw
different values from one seed; two machines of a kind don't.
"""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0, truncated at `cutoff` standard deviations."""

    std: float
    cutoff: float = 100.0


@dataclass(frozen=True)
class Ones:
    """All ones: the gain of a norm."""


InitRule = Normal | Ones


def set_determinism(seed: int, *, deterministic: bool) -> None:
    """Seed torch's own generators, and allow deterministic algorithms only if asked to."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def plain_name(name: str) -> str:
    """A parameter's name without the parts that activation checkpointing and compile wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw(rule: InitRule, shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """One whole parameter, float32, on `device`."""
    full = torch.empty(shape, device=device, dtype=torch.float32)
    if isinstance(rule, Ones):
        return full.fill_(1.0)
    generator = torch.Generator(device).manual_seed(seed)
    bound = rule.cutoff * rule.std
    return nn.init.trunc_normal_(full, std=rule.std, a=-bound, b=bound, generator=generator)


@torch.no_grad()
def init_weights(model: Any, seed: int) -> None:
    """Fill every parameter of `model` by its `init_rule`, and its buffers by `init_buffers` if it has one.

    A sharded parameter gets its part of the values that an unsharded one would get.
    """
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        full = draw(model.init_rule(name), parameter.shape, parameter.device, stream_seed(seed, name))
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every process has drawn the same values, so nothing needs to be sent
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)
    if hasattr(model, "init_buffers"):
        model.init_buffers()
