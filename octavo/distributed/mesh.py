"""The process group and the device mesh."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from octavo.config.parallel_dims import AXES, ParallelDims, parallel_dims_of
from octavo.config.schema import Comm, Parallelism
from octavo.core.environment import STORE_VARIABLE
from octavo.distributed.context_parallel import local_positions

WAITS_FOR_A_DISK = "waits for a disk"
_DISK_TIMEOUT = timedelta(hours=6)


def disk_group() -> dist.ProcessGroup:
    """A group of all processes for collectives that wait for one process's file I/O.

    Its timeout is six hours; a dead process is still detected by its lost connection.
    """
    return dist.new_group(backend="gloo", timeout=_DISK_TIMEOUT, group_desc=WAITS_FOR_A_DISK)


@dataclass(frozen=True)
class World:
    """This process's place in the job, and its process groups.

    rank, size: of all processes. layout: degree of each parallel axis. sharding: the mesh that parameters are
    sharded over, [replicate, shard x context] or [shard x context]. tensor, context: the groups that share
    matrix products and sequences. pipeline: the group whose members hold consecutive stages. data_rank: index
    of this process's data shard, below `layout.data`. loss_parallel: whether logits stay sharded by
    vocabulary over `tensor`.
    """

    rank: int
    size: int
    layout: ParallelDims
    sharding: DeviceMesh
    tensor: DeviceMesh | None
    context: DeviceMesh | None
    data_rank: int
    loss_parallel: bool = False
    pipeline: DeviceMesh | None = None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum floating-point `values`, per-process sums over local tokens, over all processes.

        Tensor-parallel processes have the same tokens, so their group counts once.
        """
        if self.size > 1:
            values = values / self.layout.tensor
            dist.all_reduce(values)
        return values

    def largest_mean(self, local_sum: torch.Tensor) -> float:
        """Largest per-process mean loss, given `local_sum` (a scalar), this process's share of the global
        loss, as if as many labels counted on each.
        """
        mean = local_sum.detach().clone() * (self.layout.data * self.layout.context)
        if self.size > 1:
            dist.all_reduce(mean, dist.ReduceOp.MAX)
        return float(mean)

    @property
    def tokens_shared(self) -> int:
        """Number of processes that work on the same tokens (context x tensor x pipeline)."""
        return self.layout.context * self.layout.tensor * self.layout.pipeline

    def local_labels(self, labels_BS: torch.Tensor) -> torch.Tensor:
        """The labels [B, P] of the positions that this process computes, from `labels_BS`."""
        if self.context is None:
            return labels_BS
        return labels_BS[:, local_positions(self.context, labels_BS.shape[1], labels_BS.device)]


def _store(world: int, timeout: timedelta) -> dist.Store | None:
    """The rendezvous store: the launcher's file, or None to use torchrun's variables. A single process gets
    a store in memory.
    """
    path = os.environ.get(STORE_VARIABLE)
    if world > 1 and path is None:
        return None
    store = dist.HashStore() if path is None or world == 1 else dist.FileStore(path, world)
    store.set_timeout(timeout)
    return store


def init_world(device: torch.device, parallelism: Parallelism, comm: Comm) -> World:
    """Join the process group described by the launcher or torchrun (or create a group of one), and build the
    mesh.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    store = _store(world, timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl"
        if device.type == "cuda"
        else "gloo",  # gloo too: offloaded gradients are on the CPU
        timeout=timeout,
        store=store,
        rank=-1 if store is None else rank,
        world_size=-1 if store is None else world,
        device_id=device if device.type == "cuda" else None,
    )
    layout = parallel_dims_of(parallelism, dist.get_world_size())
    return build_world(device, layout, loss_parallel=not parallelism.disable_loss_parallel)


def build_world(device: torch.device, layout: ParallelDims, *, loss_parallel: bool = True) -> World:
    """Build the mesh of `layout` over the default process group."""
    # Axes of degree 1 get no group, except `shard`, which always exists.
    each = layout.degrees
    degrees = {axis.mesh: each[axis.name] for axis in AXES if each[axis.name] > 1 or axis.name == "shard"}
    mesh = init_device_mesh(device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
    sharding = "dp_shard"
    if layout.context > 1:
        mesh["dp_shard", "cp"]._flatten(sharding := "dp_shard_cp")
    at = {name: mesh.get_local_rank(name) for name in degrees}
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        layout=layout,
        sharding=mesh["dp_replicate", sharding] if layout.replicate > 1 else mesh[sharding],
        tensor=mesh["tp"] if layout.tensor > 1 else None,
        context=mesh["cp"] if layout.context > 1 else None,
        loss_parallel=loss_parallel and layout.tensor > 1,
        pipeline=mesh["pp"] if layout.pipeline > 1 else None,
        data_rank=at.get("dp_replicate", 0) * layout.shard + at["dp_shard"],
    )


def set_timeout(seconds: int) -> None:
    """Set the timeout of collectives in all groups, except those of `disk_group`."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_desc == WAITS_FOR_A_DISK:
            continue
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def finish() -> None:
    """Wait for all processes, then destroy the group; doing so earlier can abort processes still using it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
