"""Refuses a job that cannot fit, before it reads its data and fills the machine's memory for minutes.

Only what is certain is counted: parameters, their gradients and the optimizer's moments, at their smallest.
Activations come on top; `octavo estimate` predicts them, too.
"""

import os
from typing import Any

import torch

from octavo import models
from octavo.config import ConfigError, JobConfig
from octavo.config.optimizers import OPTIMIZERS
from octavo.core.format import count
from octavo.core.host_memory import host_memory
from octavo.distributed.mesh import World
from octavo.distributed.stages import cut
from octavo.metrics.device import DTYPES
from octavo.preflight.pipeline_plan import PipelinePlan


def bytes_per_parameter(job: JobConfig) -> int:
    """Of the parameter, its gradient and its moments."""
    own = DTYPES[job.training.dtype].itemsize
    row = OPTIMIZERS[job.optimizer.name]
    return 2 * own + row.moments * (row.moment_bytes or DTYPES[job.optimizer.state_dtype].itemsize)


def require_memory(
    job: JobConfig, args: Any, plan: PipelinePlan | None, *, world: World, device: torch.device
) -> None:
    """`ConfigError` if what the model with `args` keeps in memory exceeds this process's device."""
    if job.job.ignore_memory:
        return
    with torch.device("meta"):
        model = models.get(job.model.name).build(args)
    parts = [model]
    if plan is not None and world.pipeline is not None:
        numbers = plan.stages_of(world.pipeline.get_local_rank())
        parts = [cut(model, plan.stages[number]) for number in numbers]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    shards = world.layout.sharded * world.layout.tensor
    needed = parameters * bytes_per_parameter(job) / shards
    on_gpu = device.type == "cuda" and not job.training.enable_cpu_offload
    together = ""
    if on_gpu:
        where, memory = "a GPU here", torch.cuda.get_device_properties(device).total_memory
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        where, memory = "this machine", host_memory()
        needed, together = needed * here, f" in {count(here, 'process')}" if here > 1 else ""
    if needed <= memory:
        return
    raise ConfigError(
        f"model.flavor = {job.model.flavor}: its parameters, gradients and optimizer states alone take "
        f"{needed / 1e9:,.1f} GB{together}, and {where} has {memory / 1e9:,.1f} GB. Choose a smaller flavor, "
        "or shard it over more devices (octavo estimate predicts the memory of a layout); to start all the "
        "same, add --job.ignore_memory"
    )
