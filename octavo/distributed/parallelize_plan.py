"""What a model's `parallelize` is told: frozen facts, made once from the config and the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from octavo.config.schema import ActivationCheckpoint


@dataclass(frozen=True)
class FSDPPlan:
    """FSDP2's settings: the data-parallel mesh (replicate x shard, or shard alone) and the dtypes.

    param_dtype: of the gathered parameters and the compute; reduce_dtype: of the gradient reduction.
    reshard: free the gathered parameters after forward and gather them again in backward. reshard_last: those
    too that backward begins with.
    """

    mesh: DeviceMesh
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard: bool
    cpu_offload: bool
    reshard_last: bool = False


@dataclass(frozen=True)
class Replicas:
    """Every process of `mesh` has the whole model in float32; gradients are summed in `reduce_dtype`."""

    mesh: DeviceMesh
    reduce_dtype: torch.dtype


@dataclass(frozen=True)
class TensorParallel:
    """Every matrix product is shared over `mesh`, and the tokens between them.

    columns, rows: the style for a linear layer that is sharded by its output or input features. gather: the
    style for a module whose first input is to be gathered for the linear layers named. Each takes the
    layer, or layers, that it is for, as float8 layers have styles of their own.
    loss_parallel: logits stay sharded by vocabulary. asynchronous: compiled layers overlap their gathers with
    their products.
    """

    mesh: DeviceMesh
    loss_parallel: bool
    columns: Callable[..., ParallelStyle]
    rows: Callable[..., ParallelStyle]
    gather: Callable[..., ParallelStyle]
    asynchronous: bool = False


@dataclass(frozen=True)
class Fusion:
    """Computes several modules in one pass, by what `octavo/float8/fused` has, for high precision too.

    normed_input: `(norm, linears)` -> an object that adds, norms and multiplies. gated_linear: `(linear)`
    -> one that computes linear(silu(gate) * up). shared_input: `(linears)` -> one that multiplies.
    """

    normed_input: Callable[..., Any]
    gated_linear: Callable[..., Any]
    shared_input: Callable[..., Any]


@dataclass(frozen=True)
class Parallelize:
    """The plan for one model. `sharding` is None where a process has whole parameters, in the dtype that it
    computes in or with copies in that (`replicas`: and is one of several that do),
    `tensor` and `context` where products and sequences are not shared. ring: keys and values travel round the
    context group, instead of being gathered. `fusion` is None
    where modules are called one by one.
    """

    activation_checkpoint: ActivationCheckpoint
    compile_model: bool
    sharding: FSDPPlan | None
    tensor: TensorParallel | None = None
    context: DeviceMesh | None = None
    ring: bool = False
    replicas: Replicas | None = None
    fusion: Fusion | None = None
