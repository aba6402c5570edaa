"""Converts a sharded linear's DTensor input to local tensors, and its local output to a DTensor.

A `Float8Linear` under tensor parallelism takes a DTensor, or a `GatheredInput` (`tp_gather.py`), multiplies
its shard with the scales of the whole operand (`tp_scales.py`), and returns a DTensor. The weight's sharding
decides the rest:

    weight sharded by      input              output
    output features, N     whole              sharded by N
    input features, K      sharded by K       sum over the ranks

If the sum is to be sharded by tokens, it is reduce-scattered inside the autograd function
(`TensorParallelSpec.pieces`), so that its gradient is gathered in float8. If blocks of tokens would straddle
ranks, or a product stays in high precision, DTensor redistributes it instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from octavo.float8.compiled.bias import add_bias
from octavo.float8.distributed.tp_gather import GatheredInput, can_gather, count_pieces
from octavo.float8.distributed.tp_scales import TensorParallelSpec
from octavo.float8.quantize import Casts
from octavo.float8.recipe import Recipe


def tensor_parallel_spec(weight: DTensor, recipe: Recipe) -> TensorParallelSpec:
    """The sharding of `weight[N, K]`.

    Raises ValueError if no tensor parallel style makes it, or if blocks would straddle ranks.
    """
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not (placements[0].is_shard(0) or placements[0].is_shard(1)):
        raise ValueError(
            f"the weight of a Float8Linear has placements {placements} over a mesh of {mesh.ndim} "
            "dimensions; it must be Shard(0) or Shard(1) over one dimension. Shard it with "
            "Float8ColwiseParallel or Float8RowwiseParallel; if FSDP shards it too, call the model that "
            "fully_shard was applied to, which gathers it"
        )
    axis = 0 if placements[0].is_shard(0) else 1
    sharding = TensorParallelSpec(axis, group_name(mesh), mesh.size())
    sharding.check(recipe, weight.shape[axis])
    return sharding


def group_name(mesh: DeviceMesh) -> str:
    return mesh.get_group().group_name


def scatter_output(
    sharding: TensorParallelSpec, recipe: Recipe, tokens: torch.Size, output: Placement | None
) -> TensorParallelSpec:
    """`sharding`, with the output scattered inside the product if possible: `output` shards `tokens` so that
    the gradient can be gathered in float8.
    """
    if sharding.axis == 0 or not isinstance(output, Shard):
        return sharding
    dim = output.dim % (len(tokens) + 1)
    row, col = recipe.grad_input.a, recipe.grad_weight.a
    if dim == len(tokens) or row is None or col is None or tokens[dim] % sharding.size:
        return sharding
    pieces = count_pieces(tokens, dim)
    if not can_gather(tokens.numel() // sharding.size, pieces, row, col):
        return sharding
    return replace(sharding, pieces=pieces)


class LocalInput(NamedTuple):
    """What this rank multiplies: `x_MK`, the tensor under which its casts are shared, its casts if they exist
    already, and the sharding of the product.
    """

    x_MK: Tensor
    owner: Tensor
    casts: Casts | None = None
    sharding: TensorParallelSpec | None = None


def local_input(
    x: Tensor | GatheredInput, weight: DTensor, recipe: Recipe, output: Placement | None
) -> LocalInput:
    """This rank's part of the input `x[..., K]`, as the sharding of `weight` requires."""
    sharding = scatter_output(tensor_parallel_spec(weight, recipe), recipe, x.shape[:-1], output)
    if isinstance(x, GatheredInput):
        if sharding.axis == 1:
            raise ValueError(
                "an input gathered in float8 reached a Float8Linear whose weight is sharded by input "
                "features: apply PrepareFloat8ModuleInput to modules with column-wise linears only"
            )
        return LocalInput(x.edge, x.edge, x.casts, sharding)
    if not isinstance(x, DTensor):
        raise ValueError(
            "a Float8Linear with a sharded weight was called with an ordinary tensor: apply "
            "Float8ColwiseParallel or Float8RowwiseParallel with parallelize_module, which say how the input "
            "is sharded; if the weight is FSDP's, call the model that fully_shard was applied to"
        )
    last = Shard(x.dim() - 1)
    needed: Placement = Replicate() if sharding.axis == 0 else last
    if x.placements != (needed,):
        x = x.redistribute(placements=[needed])
    # Each rank's output features contribute one term of the gradient of a whole input.
    local = x.to_local(grad_placements=[Partial() if sharding.axis == 0 else last])
    with torch.no_grad():
        owner = x.to_local()
    return LocalInput(local.reshape(-1, local.shape[-1]), owner, None, sharding)


class _SumGradient(torch.autograd.Function):
    """Identity; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = torch.ops._c10d_functional.all_reduce(grads[0].contiguous(), "sum", ctx.group)
        return torch.ops._c10d_functional.wait_tensor(total), None


def output_dtensor(
    y_MN: Tensor,
    bias: Tensor | None,
    tokens: torch.Size,
    mesh: DeviceMesh,
    sharding: TensorParallelSpec | None,
    output: Placement | None,
) -> DTensor:
    """This rank's product `y_MN`, plus the bias, as the DTensor `y[*tokens, N]`.

    Sharded by N if the weight is. A sum over ranks is redistributed to `output` (None: stays Partial, or
    becomes Replicate if there is a bias to add).
    """
    assert sharding is not None
    local_bias = bias.to_local() if isinstance(bias, DTensor) else bias
    if sharding.axis == 0:
        y = y_MN.reshape(*tokens, -1)
        y = y if local_bias is None else add_bias(y, local_bias)
        return DTensor.from_local(y, mesh, [Shard(len(tokens))], run_check=False)
    if sharding.pieces is not None:
        assert isinstance(output, Shard)
        dim = output.dim % (len(tokens) + 1)
        y = y_MN.reshape(*tokens[:dim], tokens[dim] // sharding.size, *tokens[dim + 1 :], y_MN.shape[1])
        y = y if local_bias is None else add_bias(y, _SumGradient.apply(local_bias, sharding.group))
        return DTensor.from_local(y, mesh, [Shard(dim)], run_check=False)
    whole = DTensor.from_local(y_MN.reshape(*tokens, -1), mesh, [Partial()], run_check=False)
    if local_bias is None:
        return whole if output is None else whole.redistribute(placements=[output])
    y = whole.redistribute(placements=[Replicate()]).to_local()
    whole = DTensor.from_local(add_bias(y, local_bias), mesh, [Replicate()], run_check=False)
    return whole if output is None else whole.redistribute(placements=[output])
