"""A two-layer model that every rank saves and loads."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from octavo.checkpoint.checkpointer import Checkpointer
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint


def build(width=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width, bias=False), nn.Linear(width, 3))
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 5), step + 1.0)).square().sum().backward()
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).tolist()


def everything(model, optimizer):
    """Parameters and optimizer state as plain lists."""
    return [[whole(p), *(whole(v) for v in optimizer.state[p].values())] for p in model.parameters()]


def save(folder, settings, steps=(3,)):
    model, optimizer = build()
    checkpointer = Checkpointer(settings, folder, model, optimizer)
    for step in steps:
        train(model, optimizer)
        checkpointer.save(step, max(steps), {"note": f"after {step}"})
    checkpointer.wait()
    return everything(model, optimizer)


def load(folder, settings, width=6, last_step=None):
    model, optimizer = build(width)
    try:
        state = Checkpointer(settings, folder, model, optimizer).load(last_step)
    except ConfigError as error:
        return str(error)
    return state, everything(model, optimizer) if state else None


ON = Checkpoint(enable=True)
