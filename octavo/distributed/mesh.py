"""The process group and the device mesh."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from octavo.config.schema import Comm, Parallelism

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

    rank, size: among all processes. mesh: the data-parallel mesh, [replicate, shard] or [shard]. data_rank,
    data_size: this process's place among those that read different data.
    """

    rank: int
    size: int
    mesh: DeviceMesh
    data_rank: int
    data_size: int


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _alone() -> dict[str, str]:
    """What torchrun would have set for a job of one process."""
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def init_world(device: torch.device, parallelism: Parallelism, comm: Comm) -> World:
    """Join the process group that torchrun described, or a group of one, and lay the mesh over it.

    Replicas are the outer dimension: processes of one node shard, nodes replicate.
    """
    if "RANK" not in os.environ:
        os.environ.update(_alone())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl"
        if device.type == "cuda"
        else "gloo",  # gloo too: offloaded gradients are on the CPU
        timeout=timedelta(seconds=comm.init_timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    size = dist.get_world_size()
    replicas = parallelism.data_parallel_replicate_degree
    if replicas > 1:
        mesh = init_device_mesh(
            device.type, (replicas, size // replicas), mesh_dim_names=("dp_replicate", "dp_shard")
        )
    else:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp_shard",))
    return World(rank=dist.get_rank(), size=size, mesh=mesh, data_rank=dist.get_rank(), data_size=size)


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
