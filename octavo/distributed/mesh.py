"""The process group and the device mesh."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.config.schema import Comm, Parallelism
from octavo.core.environment import STORE_VARIABLE
from octavo.distributed.context_parallel import local_positions

_NAMES = {
    "pipeline": "pp",
    "replicate": "dp_replicate",
    "shard": "dp_shard",
    "context": "cp",
    "tensor": "tp",
}

WAITS_FOR_A_DISK = "waits for a disk"
_DISK_TIMEOUT = timedelta(hours=6)


def disk_group() -> dist.ProcessGroup:
    """A group of all processes for collectives that wait until one of them has read or written files. A dead
    process is found by its lost connection; there is no other timeout to speak of.
    """
    return dist.new_group(backend="gloo", timeout=_DISK_TIMEOUT, group_desc=WAITS_FOR_A_DISK)


@dataclass(frozen=True)
class World:
    """Where this process stands.

    rank, size: among all processes. layout: their number along each axis. sharding: the mesh that parameters
    are sharded over, [replicate, shard x context] or [shard x context]; tensor, context: the group that this
    process shares its products, or its sequence, with. pipeline: the group whose members hold the layers one
    after another. data_rank: its place among the `layout.data` groups
    that read different data. loss_parallel: whether logits stay sharded by vocabulary over `tensor`.
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
        """Floating-point `values`, which each process has summed over its own tokens, over all tokens.

        Those that share their products have the same tokens, and count for one.
        """
        if self.size > 1:
            values = values / self.layout.tensor
            dist.all_reduce(values)
        return values

    def largest_mean(self, local_sum: torch.Tensor) -> float:
        """The largest mean over any process's own tokens of what they have in the sum over all tokens that
        `local_sum`, a scalar, is this process's part of.
        """
        mean = local_sum.detach().clone() * (self.layout.data * self.layout.context)
        if self.size > 1:
            dist.all_reduce(mean, dist.ReduceOp.MAX)
        return float(mean)

    @property
    def tokens_shared(self) -> int:
        """How many processes work on one token's sequence, products or layers together."""
        return self.layout.context * self.layout.tensor * self.layout.pipeline

    def local_labels(self, labels_BS: torch.Tensor) -> torch.Tensor:
        """The labels of the positions that this process computes."""
        if self.context is None:
            return labels_BS
        return labels_BS[:, local_positions(self.context, labels_BS.shape[1], labels_BS.device)]


def _store(world: int, timeout: timedelta) -> dist.Store | None:
    """Where the processes find each other: a file that the launcher has named, or, None, as torchrun's
    variables say. A single process needs no place for it.
    """
    path = os.environ.get(STORE_VARIABLE)
    if world > 1 and path is None:
        return None
    store = dist.HashStore() if path is None or world == 1 else dist.FileStore(path, world)
    store.set_timeout(timeout)
    return store


def init_world(device: torch.device, parallelism: Parallelism, comm: Comm) -> World:
    """Join the process group that the launcher or torchrun described, or a group of one, and lay the mesh
    over it.
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
    """Lay the mesh of `layout` over the default process group."""
    # Axes of one process take no group of their own, but for the one that is always there.
    degrees = {_NAMES[axis]: n for axis, n in layout.degrees.items() if n > 1 or axis == "shard"}
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
    """From now on a collective of any group that takes longer than `seconds` is an error; but for groups that
    wait for a disk.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_desc == WAITS_FOR_A_DISK:
            continue
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def finish() -> None:
    """Leave together: a process that destroys its group while another still uses it can abort the other."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
