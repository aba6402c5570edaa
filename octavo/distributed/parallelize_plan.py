"""The arguments of a model's `parallelize`: frozen, built once from the config and the device."""

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
    reshard: free the gathered parameters after forward and gather them again in backward. reshard_last: do so
    even for the last group, which backward needs first.
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
    """Matrix products are sharded over `mesh`, and the tokens between them (sequence parallelism).

    columns, rows: return the style of a linear layer sharded by output or input features. gather: returns the
    style of a module whose first input is gathered for the given linear layers. Each takes the layer or
    layers, because float8 layers need other styles. loss_parallel: logits stay sharded by vocabulary.
    asynchronous: compiled layers overlap gathers with matrix products.
    """

    mesh: DeviceMesh
    loss_parallel: bool
    columns: Callable[..., ParallelStyle]
    rows: Callable[..., ParallelStyle]
    gather: Callable[..., ParallelStyle]
    asynchronous: bool = False


@dataclass(frozen=True)
class Fusion:
    """Factories of fused modules from `octavo/float8/fused`, which also fuse high precision.

    normed_input: `(norm, linears)` -> residual add, norm and the linears. gated_linear: `(linear)` ->
    linear(silu(gate) * up). shared_input: `(linears)` -> linears with one input.
    """

    normed_input: Callable[..., Any]
    gated_linear: Callable[..., Any]
    shared_input: Callable[..., Any]


@dataclass(frozen=True)
class Parallelize:
    """The plan for one model.

    sharding: None if each process has all parameters (in the compute dtype, or with copies in it); replicas:
    then set if several processes do. tensor, context: None without that axis. ring: use ring attention
    instead of gathering keys and values. fusion: None to call modules one by one.
    """

    activation_checkpoint: ActivationCheckpoint
    compile_model: bool
    sharding: FSDPPlan | None
    tensor: TensorParallel | None = None
    context: DeviceMesh | None = None
    ring: bool = False
    replicas: Replicas | None = None
    fusion: Fusion | None = None
