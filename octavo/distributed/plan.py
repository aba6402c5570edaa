"""What a model's `parallelize` is told: frozen facts, made once from the config and the device."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from octavo.config.schema import ActivationCheckpoint


@dataclass(frozen=True)
class Sharding:
    """FSDP2's settings: the data-parallel mesh (replicate x shard, or shard alone) and the dtypes.

    param_dtype: of the gathered parameters and the compute; reduce_dtype: of the gradient reduction.
    reshard: free the gathered parameters after forward and gather them again in backward.
    """

    mesh: DeviceMesh
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard: bool
    cpu_offload: bool


@dataclass(frozen=True)
class Parallelize:
    """The plan for one model. `sharding` is None where one process computes in its parameters' own dtype."""

    activation_checkpoint: ActivationCheckpoint
    compile_model: bool
    sharding: Sharding | None
