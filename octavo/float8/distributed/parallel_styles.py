"""Tensor parallel styles that communicate activations in float8.

`torch.distributed.tensor.parallel` shards a linear's weight over a group of ranks: column-wise by output
features, row-wise by input features. Under sequence parallelism the tokens between such pairs are sharded
too: they are gathered before the column-wise linears, and the row-wise linear's sum is scattered. The styles
here are used as torch's are, on `Float8Linear`s, and compute what one process would:

    PrepareFloat8ModuleInput   one gather, in float8, for all column-wise linears of a module (wq, wk, wv)
    Float8ColwiseParallel      gathers its input in float8, unless it was gathered before
    Float8RowwiseParallel      scatters its output; its gradient is gathered in float8

    plan = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareFloat8ModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "attention.wq": Float8ColwiseParallel(),
        "attention.wk": Float8ColwiseParallel(),
        "attention.wv": Float8ColwiseParallel(),
        "attention.wo": Float8RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(block, mesh, plan)

The bytes sent are those that the products read: one per element with one scale per tensor; two, as in
bfloat16, if rows and columns are scaled separately and the weight is trained. Torch's own styles work on
Float8Linears too, with the same results, and gather in high precision. So do these, silently, where float8
cannot be gathered: if a product in high precision needs the tensor itself, if blocks of tokens would straddle
ranks, or if tokens do not divide evenly.

Scales are those of the whole tensor (`tp_scales.py`), so results equal one process's up to the order of sums.
Parameters are DTensors under their usual names.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

from octavo.float8.casts.delayed_statistics import is_recomputing
from octavo.float8.casts.input_cache import compute_once
from octavo.float8.distributed.dtensor_io import group_name
from octavo.float8.distributed.tp_gather import (
    GatheredInput,
    can_gather,
    cast_and_gather,
    count_pieces,
    gathered_input,
)
from octavo.float8.distributed.tp_scales import TensorParallelSpec
from octavo.float8.linear import Float8Linear

Layouts = tuple[Placement, ...]


def _linear(module: nn.Module, style: str) -> Float8Linear:
    if not isinstance(module, Float8Linear):
        raise ValueError(
            f"{style} was applied to a {type(module).__name__}; it takes a Float8Linear. Call "
            "convert_to_float8_training before parallelize_module, or use torch's "
            f"{style.removeprefix('Float8')} for a module in high precision"
        )
    return module


def _gather(
    x: Any, layout: Placement, linear: Float8Linear, *, for_grad_weight: bool, mesh: DeviceMesh
) -> Any:
    """`x[..., K]`, of which this rank has the shard `layout`, gathered whole in float8 as `linear` casts its
    input; None if that is impossible.
    """
    recipe = linear.recipe
    statistics = None if linear.statistics is None else linear.statistics.input
    trains = torch.is_grad_enabled()
    if isinstance(x, DTensor):
        layout = x.placements[0]
    if not isinstance(layout, Shard) or isinstance(x, GatheredInput):
        return None
    size, dim = mesh.size(), layout.dim % x.dim()
    row, col = recipe.output.a, recipe.grad_weight.b if for_grad_weight else None
    if dim == x.dim() - 1 or row is None or (for_grad_weight and col is None):
        return None
    if isinstance(x, DTensor):
        if x.shape[dim] % size:
            return None
        x = x.to_local()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    pieces = count_pieces(x.shape, dim)
    x_MK = x.reshape(-1, x.shape[-1])
    if not can_gather(x_MK.shape[0], pieces, row, col):
        return None
    group = group_name(mesh)
    with torch.no_grad():
        casts = compute_once(
            x,
            ("gathered", group, dim, row, col, statistics),
            lambda: cast_and_gather(
                x_MK.detach(),
                row,
                col,
                pieces=pieces,
                size=size,
                group=group,
                statistics=statistics,
                record=trains,
                count_saturated=trains and not is_recomputing(),
            ),
        )
    shape = torch.Size((*x.shape[:dim], x.shape[dim] * size, *x.shape[dim + 1 :]))
    return gathered_input(x_MK, casts, shape, pieces=pieces, size=size, group=group)


def _trains(linears: list[Float8Linear]) -> bool:
    return torch.is_grad_enabled() and any(linear.weight.requires_grad for linear in linears)


class Float8ColwiseParallel(ColwiseParallel):
    """`ColwiseParallel` for a `Float8Linear`, with its input gathered in float8.

    Arguments are ColwiseParallel's: `input_layouts` (default Replicate()), `output_layouts` (default
    Shard(-1)), `use_local_output` (default True). Also takes the input that PrepareFloat8ModuleInput
    gathered. Raises ValueError for a module that is not a Float8Linear, and if out_features does not divide
    into whole blocks per rank.
    """

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Layouts,
        desired_input_layouts: Layouts,
        mod: nn.Module,
        inputs: Any,
        device_mesh: DeviceMesh,
    ) -> Any:
        (x, *_) = inputs
        if isinstance(x, GatheredInput):
            return x
        assert isinstance(mod, Float8Linear)
        x_gathered = _gather(x, input_layouts[0], mod, for_grad_weight=_trains([mod]), mesh=device_mesh)
        if x_gathered is not None:
            return x_gathered
        return ColwiseParallel._prepare_input_fn(
            input_layouts, desired_input_layouts, mod, inputs, device_mesh
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linear = _linear(module, type(self).__name__)
        TensorParallelSpec(0, "", device_mesh.size()).check(linear.recipe, linear.out_features)
        linear.tensor_parallel = True
        return super()._apply(module, device_mesh)


class Float8RowwiseParallel(RowwiseParallel):
    """`RowwiseParallel` for a `Float8Linear`, with its output's gradient gathered in float8.

    Arguments are RowwiseParallel's: `input_layouts` (default Shard(-1)), `output_layouts` (default
    Replicate()), `use_local_output` (default True). Raises ValueError for a module that is not a
    Float8Linear, and if in_features does not divide into whole blocks per rank.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linear = _linear(module, type(self).__name__)
        TensorParallelSpec(1, "", device_mesh.size()).check(linear.recipe, linear.in_features)
        linear.tensor_parallel = True
        linear.output_placement = self.output_layouts[0]
        return super()._apply(module, device_mesh)


class PrepareFloat8ModuleInput(PrepareModuleInput):
    """`PrepareModuleInput` for a module that passes its input to column-wise `Float8Linear`s: inputs that are
    sharded by tokens and needed whole are gathered once, in float8.

    input_layouts, desired_input_layouts, input_kwarg_layouts, desired_input_kwarg_layouts: how each input is
        sharded, and should be; None leaves it unchanged.
    use_local_output: whether inputs that were not gathered in float8 become ordinary tensors (default False).
    float8_dtype: the float8 type of those linears' input.
    fwd_config_submodule_fqn: the name, relative to the module, of a linear that reads the input; its recipe
        defines the cast. Without it, all Float8Linears in the module must have one recipe.

    The module may pass a gathered input to Float8Linears only: any other operation raises TypeError. Raises
    ValueError if the recipe is ambiguous or does not cast the input to `float8_dtype`.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | tuple[Placement | None, ...] | None = None,
        desired_input_layouts: Placement | tuple[Placement | None, ...] | None = None,
        input_kwarg_layouts: dict[str, Placement] | None = None,
        desired_input_kwarg_layouts: dict[str, Placement] | None = None,
        use_local_output: bool = False,
        float8_dtype: torch.dtype = torch.float8_e4m3fn,
        fwd_config_submodule_fqn: str | None = None,
    ) -> None:
        super().__init__(
            input_layouts=input_layouts,
            desired_input_layouts=desired_input_layouts,
            input_kwarg_layouts=input_kwarg_layouts,
            desired_input_kwarg_layouts=desired_input_kwarg_layouts,
            use_local_output=use_local_output,
        )
        self.float8_dtype = float8_dtype
        self.fwd_config_submodule_fqn = fwd_config_submodule_fqn
        self.readers: list[Float8Linear] = []

    def _readers(self, module: nn.Module) -> list[Float8Linear]:
        """The linears whose recipe defines the cast of the input."""
        name = self.fwd_config_submodule_fqn
        if name is not None:
            return [_linear(module.get_submodule(name), "PrepareFloat8ModuleInput.fwd_config_submodule_fqn")]
        linears = [m for m in module.modules() if isinstance(m, Float8Linear)]
        if not linears:
            raise ValueError(
                f"PrepareFloat8ModuleInput was applied to a {type(module).__name__} without a Float8Linear: "
                "call convert_to_float8_training before, or use torch's PrepareModuleInput"
            )
        recipes = {linear.recipe.name: linear.recipe for linear in linears}
        if any(linear.recipe != linears[0].recipe for linear in linears):
            raise ValueError(
                f"the Float8Linears of {type(module).__name__} have different recipes "
                f"({', '.join(recipes)}): name one that reads the input in fwd_config_submodule_fqn"
            )
        return linears

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        readers = self._readers(module)
        cast = readers[0].recipe.output.a
        if cast is not None and cast.dtype != self.float8_dtype:
            raise ValueError(
                f"PrepareFloat8ModuleInput has float8_dtype={self.float8_dtype}, and recipe "
                f"{readers[0].recipe.name!r} casts inputs to {cast.dtype}: pass float8_dtype={cast.dtype}"
            )
        style = copy.copy(self)  # a plan may apply one style to many modules
        style.readers = readers
        return super(PrepareFloat8ModuleInput, style)._apply(module, device_mesh)

    def _prepare_input_arg(
        self,
        input: Any,
        mesh: DeviceMesh,
        input_layout: Placement | None,
        desired_layout: Placement | None,
    ) -> Any:
        if input_layout is not None and desired_layout is not None and desired_layout.is_replicate():
            gathered = _gather(
                input,
                input_layout,
                self.readers[0],
                for_grad_weight=_trains(self.readers),
                mesh=mesh,
            )
            if gathered is not None:
                return gathered
        return super()._prepare_input_arg(input, mesh, input_layout, desired_layout)
