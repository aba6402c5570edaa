"""Initial weights as a function of (seed, parameter name).

Each parameter has its own random stream, seeded by a hash of the run's seed and the parameter's name. Every
process draws the whole parameter and keeps its shard, so initial weights depend neither on the number of
processes, nor on the order of initialisation, nor on which layers a process holds. The cost: each process
draws all values, and briefly holds the largest parameter whole. A CPU and a GPU draw different values from
the same seed.
"""

import hashlib
import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


@dataclass(frozen=True)
class Normal:
    """A normal distribution of mean 0, truncated at `cutoff` standard deviations."""

    std: float
    cutoff: float = 100.0


@dataclass(frozen=True)
class Ones:
    """All ones, for the gain of a norm."""


InitRule = Normal | Ones


def set_determinism(seed: int, *, deterministic: bool) -> None:
    """Seed torch, Python's `random` and NumPy; `deterministic` also turns on torch's deterministic
    algorithms.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator, which user code may draw from
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def plain_name(name: str) -> str:
    """The name of a parameter or module without the wrappers of activation checkpointing and compile."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw(rule: InitRule, shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """The initial value of one unsharded parameter, float32, on `device`."""
    full = torch.empty(shape, device=device, dtype=torch.float32)
    if isinstance(rule, Ones):
        return full.fill_(1.0)
    generator = torch.Generator(device).manual_seed(seed)
    bound = rule.cutoff * rule.std
    return nn.init.trunc_normal_(full, std=rule.std, a=-bound, b=bound, generator=generator)


def local_shard(full: Tensor, sharded: DTensor) -> Tensor:
    """This process's shard of `full`, with the placements of `sharded`.

    Where FSDP2 shards a dimension that tensor parallelism has already sharded, the mesh lists FSDP2 first
    although it shards last; DTensor calls that placement strided.
    """
    mesh = sharded.device_mesh
    shards = [(p, i) for i, p in enumerate(sharded.placements) if isinstance(p, Shard | _StridedShard)]
    for placement, axis in sorted(shards, key=lambda shard: isinstance(shard[0], _StridedShard)):
        chunks = full.chunk(mesh.size(axis), placement.dim)
        rank = mesh.get_local_rank(axis)
        full = chunks[rank] if rank < len(chunks) else full.narrow(placement.dim, 0, 0)
    return full


@torch.no_grad()
def init_weights(model: Any, seed: int) -> None:
    """Fill every parameter of `model` by its `init_rule`, and its buffers by `init_buffers` if it has one.

    A sharded parameter gets its shard of the values that the unsharded one would get.
    """
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        full = draw(model.init_rule(name), parameter.shape, parameter.device, stream_seed(seed, name))
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(local_shard(full, parameter))
        else:
            parameter.copy_(full)
    if hasattr(model, "init_buffers"):
        model.init_buffers()
