"""The float8 linear layer: three matrix products, with each operand cast once.

    forward    x[M, K]  -> x_MK for the output, x_KM for grad_weight     one read of x, two casts
               w[N, K]  -> w_NK for the output
    backward   dy[M, N] -> dy_MN for grad_input, dy_NM for grad_weight   one read of dy, two casts
               w[N, K]  -> w_KN for grad_input

Saved for backward are x_KM, one byte per element, and the weight, which exists anyway: half of what a
bfloat16 linear saves. The trade-off: x is cast both ways in forward, so that x itself need not be kept.

x and the weight are cast outside the autograd function, because casts can be shared: linears with the same
input share its casts (`casts/input_cache.py`), `cast_weights_once` reuses a weight's casts over an optimizer
step, and FSDP and tensor parallelism communicate them in float8 (`distributed/`).

Letters as in `recipe.py`: M tokens, K input features, N output features.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from octavo.float8.casts.delayed_statistics import (
    LayerStatistics,
    OperandStatistics,
    is_recomputing,
    quantize_operand,
)
from octavo.float8.casts.input_cache import compute_once
from octavo.float8.compiled.bias import add_bias
from octavo.float8.compiled.pin_saved import pin_saved
from octavo.float8.config import Options, resolve
from octavo.float8.distributed.dtensor_io import (
    local_input,
    output_dtensor,
    scatter_output,
    tensor_parallel_spec,
)
from octavo.float8.distributed.fsdp_gather import plain_parameter, shard_in_float8
from octavo.float8.distributed.tp_gather import GatheredInput, cast_and_gather, scatter_rows
from octavo.float8.distributed.tp_scales import ShardedAxis, TensorParallelSpec
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.matmul import matmul, warn_if_emulated
from octavo.float8.quantize import Casts, Quantized, quantize, quantize_both
from octavo.float8.recipe import Recipe

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def needed_gradients(ctx: Any, first: int, count: int) -> list[bool]:
    """Which of the gradients of `count` tensor arguments, the first at index `first`, backward must compute
    now.

    Zero-bubble pipeline schedules compute grad_input and grad_weight in separate passes over one graph. In
    each pass `needs_input_grad` is true for both, but the autograd engine knows which edges it will follow.
    No tensor argument may come before the first one.
    """
    needed = list(ctx.needs_input_grad[first : first + count])
    if torch.compiler.is_compiling():
        return needed
    nodes = [node for node, _ in ctx.next_functions[:count]]  # of tensor arguments only
    try:
        return [
            need and node is not None and torch._C._will_engine_execute_node(node)
            for need, node in zip(needed, nodes, strict=True)
        ]
    except (RuntimeError, ValueError):  # outside a pass of the engine, or the engine does not track this edge
        return needed


def _operand(data: Tensor | None, scale: Tensor | None, high_precision: Tensor) -> Quantized | Tensor:
    if data is None or scale is None:
        return high_precision
    return Quantized(data, scale)


class Float8Matmul(torch.autograd.Function):
    """`y[M, N] = x[M, K] . w[N, K]^T`, with the products of the gradients as `recipe` says.

    The casts x_MK, x_KM, w_NK and w_KN are (data, scale) pairs, or (None, None) for an operand in high
    precision. Without w_KN, backward casts w. `sharding`: x and w are one rank's shards of a tensor parallel
    product. `grad_output`: the delayed-scaling statistics of dy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        x_MK: Tensor | None,
        x_MK_scale: Tensor | None,
        x_KM: Tensor | None,
        x_KM_scale: Tensor | None,
        w_NK: Tensor | None,
        w_NK_scale: Tensor | None,
        w_KN: Tensor | None,
        w_KN_scale: Tensor | None,
        recipe: Recipe,
        emulate: bool | None,
        sharding: TensorParallelSpec | None,
        grad_output: OperandStatistics | None = None,
    ) -> Tensor:
        need_x, need_w = ctx.needs_input_grad[:2]
        keep_x = (x if x_KM is None else x_KM, x_KM_scale) if need_w else (None, None)
        keep_w = (w if w_KN is None else w_KN, w_KN_scale) if need_x else (None, None)
        ctx.save_for_backward(*keep_x, *keep_w)
        ctx.recipe, ctx.emulate, ctx.sharding, ctx.grad_output = recipe, emulate, sharding, grad_output
        y = matmul(
            _operand(x_MK, x_MK_scale, x),
            _operand(w_NK, w_NK_scale, w.to(x.dtype) if recipe.output.b is None else w),
            recipe.output,
            x.dtype,
            emulate=emulate,
        )
        if sharding is None or sharding.pieces is None:
            return y
        return scatter_rows(y, sharding.pieces, sharding.size, sharding.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, x_scale, w, w_scale = ctx.saved_tensors
        recipe, emulate, sharding = ctx.recipe, ctx.emulate, ctx.sharding
        grad_input, grad_weight = recipe.grad_input, recipe.grad_weight
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Without this, a second derivative would be silently wrong.
            raise RuntimeError(
                "a Float8Linear cannot be differentiated twice (create_graph=True): casting to float8 has no "
                "useful second derivative. Keep the layers that need one in high precision with "
                "module_filter_fn, or differentiate once"
            )
        want_x, want_w = needed_gradients(ctx, 0, 2)
        dx = dw = None
        with torch.no_grad():
            # Count saturated elements in one of two passes over the same graph.
            count_saturated = want_x or not ctx.needs_input_grad[0]
            dy_MN, dy_NM = _cast_grad_output(
                dy,
                recipe,
                sharding,
                ctx.grad_output,
                want_x=want_x,
                want_w=want_w,
                count_saturated=count_saturated,
            )
            if want_x:
                if w_scale is not None:
                    w_KN: Quantized | Tensor = Quantized(w, w_scale)
                else:
                    sharded = sharding.weight.transposed if sharding else None
                    w_KN = (
                        w.t().to(dy.dtype) if grad_input.b is None else quantize(w.t(), grad_input.b, sharded)
                    )
                dx = matmul(dy_MN, w_KN, grad_input, dy.dtype, emulate=emulate)
            if want_w:
                x_KM = x.t() if x_scale is None else Quantized(x, x_scale)
                dw = matmul(dy_NM, x_KM, grad_weight, dy.dtype, emulate=emulate)
        return dx, dw, *[None] * 12


def _cast_grad_output(
    dy: Tensor,
    recipe: Recipe,
    sharding: TensorParallelSpec | None,
    statistics: OperandStatistics | None,
    *,
    want_x: bool,
    want_w: bool,
    count_saturated: bool,
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """`dy[M, N]` as grad_input's `[M, N]` and grad_weight's `[N, M]`, gathered if tokens are sharded."""
    row, col = recipe.grad_input.a, recipe.grad_weight.a if want_w else None
    if sharding is not None and sharding.pieces is not None:
        assert row is not None
        first, second = cast_and_gather(
            dy,
            row,
            col,
            pieces=sharding.pieces,
            size=sharding.size,
            group=sharding.group,
            statistics=statistics,
            count_saturated=count_saturated,
        )
        assert first is not None
        return first, dy if second is None else second
    sharded = sharding.grad_output if sharding else None
    return quantize_operand(
        dy, row if want_x else None, col, sharded, statistics, count_saturated=count_saturated
    )


def only_casts(*operands: Quantized | Tensor) -> Casts:
    """The two operands, with None in place of those that stay in high precision."""
    first, second = (q if isinstance(q, Quantized) else None for q in operands)
    return first, second


def cast_input(
    x: Tensor,
    recipe: Recipe,
    *,
    for_grad_weight: bool,
    sharded: ShardedAxis | None = None,
    statistics: OperandStatistics | None = None,
    record: bool = False,
) -> Casts:
    """`x[M, K]` as the output's operand `[M, K]` and, if `for_grad_weight`, as grad_weight's `[K, M]`.

    None for an operand that stays in high precision or is not wanted. `sharded`: how x is sharded over ranks;
    `statistics` and `record` as in `quantize_operand`.
    """
    row, col = recipe.output.a, recipe.grad_weight.b if for_grad_weight else None
    first, second = quantize_operand(
        x, row, col, sharded, statistics, record=record, count_saturated=record and not is_recomputing()
    )
    return only_casts(first, second)


def cast_weight(
    w: Tensor, recipe: Recipe, *, for_grad_input: bool, sharded: ShardedAxis | None = None
) -> Casts:
    """`w[N, K]` as the output's operand `[N, K]` and, if `for_grad_input`, as grad_input's `[K, N]`."""
    row, col = recipe.output.b, recipe.grad_input.b if for_grad_input else None
    first, second = quantize_both(w, row, col, sharded)
    return only_casts(first, second)


def _flat(casts: Casts) -> list[Tensor | None]:
    return [part for q in casts for part in ((None, None) if q is None else q)]


def weight_operands(w: Tensor, recipe: Recipe, sharded: ShardedAxis | None = None) -> Casts:
    """The casts of a weight that has none cached: those of a weight gathered in float8, or a new one.

    A new cast is for the output only. Backward casts the weight again for grad_input, so that no memory of
    the weight's size is held between.
    """
    if isinstance(w, UnshardedWeight):
        return w.casts()
    return cast_weight(w, recipe, for_grad_input=False, sharded=sharded)


class Float8Linear(nn.Linear):
    """`nn.Linear` whose three products run in float8. `config`: options, a `Recipe`, or a recipe's name.

    Parameters, state dict and signature are those of `nn.Linear`. Takes `[..., in_features]` with any number
    of leading dimensions, in bfloat16, float16 or float32, and returns `[..., out_features]` in the same
    dtype (under autocast, in autocast's).

    `keep_input`: whether compiled code must save the input's cast for backward. If False and the input has
    two bytes per element, the compiler may recompute it instead (`convert.py` decides).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: Options | None = None,
        emulate: bool | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe, self.config = resolve(config)
        self.emulate = emulate if self.config is None or emulate is not None else self.config.emulate
        self.statistics: LayerStatistics | None = None  # set by `DelayedScaling`
        self.weight_casts: Casts | None = None
        self._cast_weight: tuple[weakref.ref[Tensor], int] | None = None  # whose casts those are
        self._optimizer_casts: tuple[Casts, weakref.ref[Tensor], int] | None = None
        self.watch: Callable[[Tensor, Tensor], Tensor] | None = None  # set on steps that `health` measures
        # Set by tensor parallel styles: whether one applies, and the placement of an output that is a sum.
        self.tensor_parallel = False
        self.output_placement: Placement | None = None
        self.keep_input = True
        self.shared_input: Any = None  # the `fused.SharedInput` that has this linear as a member

    @classmethod
    def from_float(
        cls, mod: nn.Linear, config: Options | None = None, *, emulate: bool | None = None
    ) -> Self:
        """A float8 linear with the parameters of `mod` (shared, not copied), its hooks and buffers."""
        if not isinstance(mod, nn.Linear):
            raise TypeError(f"Float8Linear.from_float takes an nn.Linear, not a {type(mod).__name__}")
        new = cls(
            mod.in_features,
            mod.out_features,
            bias=mod.bias is not None,
            device="meta",
            dtype=mod.weight.dtype,
            config=config,
            emulate=emulate,
        )
        # Parameters, buffers, hooks and any other attributes.
        new.__dict__.update(
            {k: copy.copy(v) if isinstance(v, dict | set) else v for k, v in mod.__dict__.items()}
        )
        warn_if_emulated(new.recipe, mod.weight.device, new.emulate)
        return new

    def to_float(self) -> nn.Linear:
        """A plain `nn.Linear` with the parameters of this one (shared, not copied), its hooks and buffers."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        own = set(Float8Linear(1, 1, device="meta", config=self.recipe).__dict__) - set(plain.__dict__)
        plain.__dict__.update(
            {
                k: copy.copy(v) if isinstance(v, dict | set) else v
                for k, v in self.__dict__.items()
                if k not in own
            }
        )
        return plain

    def forward(self, input: Tensor) -> Tensor:
        """`input[..., K] -> [..., N]`. ValueError for another last dimension, TypeError for other dtypes."""
        x = input
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Float8Linear takes [..., {self.in_features}]; the input is {tuple(x.shape)}: its last "
                f"dimension must be in_features={self.in_features}"
            )
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype not in DTYPES:
            raise TypeError(
                f"Float8Linear takes bfloat16, float16 or float32; the input is {x.dtype}: convert it"
            )
        if not torch.compiler.is_compiling():
            warn_if_emulated(self.recipe, x.device, self.emulate)

        if isinstance(self.weight, DTensor):
            return self._forward_sharded(x, self.weight)
        y_MN = self._multiply(x.reshape(math.prod(x.shape[:-1]), self.in_features), self.weight, input)
        # Not a view for autograd, like nn.Linear's output: FSDP2 warns about modules that return views.
        y = torch.ops.aten._unsafe_view(y_MN.contiguous(), (*x.shape[:-1], self.out_features))
        y = y if self.bias is None else add_bias(y, self.bias)
        return y if self.watch is None else self.watch(x, y)

    def _multiply(
        self,
        x_MK: Tensor,
        weight: Tensor,
        owner: Tensor,
        *,
        x_casts: Casts | None = None,
        sharding: TensorParallelSpec | None = None,
    ) -> Tensor:
        """`y_MN`. `owner` is the tensor under which the casts of `x_MK` are cached."""
        trains = torch.is_grad_enabled()
        for_grad_weight = weight.requires_grad and trains
        statistics = None if self.statistics is None else self.statistics.input
        sharded = sharding.input if sharding else None
        if x_casts is None:
            row, col = self.recipe.output.a, self.recipe.grad_weight.b if for_grad_weight else None
            with torch.no_grad():
                x_casts = compute_once(
                    owner,
                    (x_MK.dtype, row, col, sharded, statistics),
                    lambda: cast_input(
                        x_MK.detach(),
                        self.recipe,
                        for_grad_weight=for_grad_weight,
                        sharded=sharded,
                        statistics=statistics,
                        record=trains,
                    ),
                )
                if torch.compiler.is_compiling() and (self.keep_input or x_MK.dtype == torch.float32):
                    x_casts = pin_saved(x_casts, one_cast=row == col and row is not None and row.square)
        w_casts = self.current_weight_casts()
        if w_casts is None:
            with torch.no_grad():
                w_casts = weight_operands(weight, self.recipe, sharding.weight if sharding else None)
        # Views: `needed_gradients` can ask the engine about inner nodes of the graph only, not leaves.
        return Float8Matmul.apply(
            x_MK.view_as(x_MK),
            weight.view_as(weight),
            *_flat(x_casts),
            *_flat(w_casts),
            self.recipe,
            self.emulate,
            sharding,
            self.statistics.grad_output if self.statistics else None,
        )

    def _forward_sharded(self, x: Tensor | GatheredInput, weight: DTensor) -> Tensor:
        tokens = x.shape[:-1]
        sharding = scatter_output(
            tensor_parallel_spec(weight, self.recipe), self.recipe, tokens, self.output_placement
        )
        x_MK, owner, x_casts = local_input(x, sharding)
        y_MN = self._multiply(x_MK, weight.to_local(), owner, x_casts=x_casts, sharding=sharding)
        return output_dtensor(y_MN, self.bias, tokens, weight.device_mesh, sharding, self.output_placement)

    @property
    def gathers_float8(self) -> bool:
        """Whether FSDP2 gathers the weight in float8."""
        return self.config is not None and self.config.enable_fsdp_float8_all_gather

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets its sharded parameter by assignment.
        if name == "weight" and isinstance(value, DTensor) and self.gathers_float8:
            assert self.recipe.output.b is not None
            shard_in_float8(value, self.recipe.output.b, previous=self._parameters.get("weight"))
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and self.gathers_float8:
            destination[f"{prefix}weight"] = plain_parameter(destination[f"{prefix}weight"])

    def cast_weight_for_step(self) -> None:
        """Cast the weight into `weight_casts`, which `forward` uses until it is None again."""
        weight = self.weight
        sharded = None
        if isinstance(weight, DTensor):
            if not self.tensor_parallel or weight.device_mesh.ndim != 1:  # FSDP's
                return
            sharded = tensor_parallel_spec(weight, self.recipe).weight
            weight = weight.to_local()
        if isinstance(weight, UnshardedWeight):  # gathered in float8, so it has casts
            return
        if not isinstance(self.weight, nn.Parameter):  # computed at each use, e.g. by weight_norm
            return
        made = self._optimizer_casts if sharded is None else None
        self._optimizer_casts = None
        if made is None or made[1]() is not self.weight or made[2] != self.weight._version:
            self.weight_casts = cast_weight(
                weight.detach(), self.recipe, for_grad_input=True, sharded=sharded
            )
        else:  # made by the optimizer
            self.weight_casts = made[0]
        self._cast_weight = weakref.ref(self.weight), self.weight._version

    def set_optimizer_casts(self, casts: Casts) -> None:
        """Store an optimizer's casts of the current weight. `cast_weight_for_step` uses them unless the
        weight is written to first.
        """
        self._optimizer_casts = casts, weakref.ref(self.weight), self.weight._version

    def current_weight_casts(self) -> Casts | None:
        """`weight_casts`, unless the weight was replaced or edited since.

        An edit that does not advance the version, e.g. through `.data`, is not noticed, nor is any in
        compiled code.
        """
        if self.weight_casts is None or self._cast_weight is None or torch.compiler.is_compiling():
            return self.weight_casts
        held, version = self._cast_weight
        same = held() is self.weight and self.weight._version == version
        return self.weight_casts if same else None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have parameters only.
        return self.__dict__ | {
            "weight_casts": None,
            "_cast_weight": None,
            "watch": None,
            "statistics": None,
            "_optimizer_casts": None,
        }

    def extra_repr(self) -> str:
        emulate = "" if self.emulate is None else f", emulate={self.emulate}"
        return f"{super().extra_repr()}, recipe={self.recipe.name}{emulate}"
