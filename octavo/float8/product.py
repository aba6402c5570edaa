"""The three products of one input and one or more weights, as one autograd function.

    forward    y_1 | y_2 | ...  =  x[M, K] . (w_1 | w_2 | ...)[N, K]^T     one product
    backward   dy_i[M, N_i]  ->  cast as [M, N_i] for grad_input and as [N_i, M] for grad_weight, in one read
               dx = sum_i dy_i . w_i,   dw_i = dy_i^T . x

Saved for backward are the input's cast `x_KM`, one byte per element, and the weights, which exist anyway:
half of what a bfloat16 linear saves. (Where grad_weight is in high precision, the input itself is saved.)

A `Float8Linear` passes one weight. Linears with one input can pass theirs together (`fused/`): scales are per
row or per block of rows, so the concatenated casts of several weights are the cast of the concatenation, bit
for bit, unless a block straddles two weights. dy's contraction runs over N, along which the scales of
separate gradients differ from those of the joined one. So gradients are multiplied one by one, in the order
in which autograd would add those of separate linears.

The operands are cast outside the function, because casts can be shared (`casts/`), except dy, which exists
only inside. Letters as in `recipe.py`: M tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.float8.casts.delayed_statistics import OperandStatistics
from octavo.float8.casts.operands import cast_grad_output
from octavo.float8.casts.producer_maxima import maxima_from_gradients
from octavo.float8.compiled.bias import add_bias
from octavo.float8.distributed.tp_gather import scatter_rows
from octavo.float8.distributed.tp_scales import TensorParallelSpec
from octavo.float8.matmul import matmul
from octavo.float8.quantize import Casts, Quantized, quantize
from octavo.float8.recipe import Recipe

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Product(NamedTuple):
    """A linear's output `value[..., N]`, and two more outputs whose gradients are the maxima of value's
    gradient, if its consumer computes them (`casts/producer_maxima.py`).
    """

    value: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class ProductSpec:
    """The arguments of a product that are not tensors.

    weights: how many. maxima: whether each has outputs for the maxima of its gradient. sharding: x and the
    one weight are one rank's shards of a tensor parallel product. remake: makes grad_weight's operand
    `x_KM` in backward, from the recipe, the two tensors that were given in place of its data and scale, and
    dy.
    """

    recipe: Recipe
    emulate: bool | None = None
    weights: int = 1
    maxima: bool = False
    sharding: TensorParallelSpec | None = None
    remake: Callable[[Recipe, Tensor, Tensor, Tensor], Quantized | Tensor] | None = None


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


def refuse_second_derivative() -> None:
    """Raise RuntimeError in a backward that is to be differentiated; the result would be silently wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a Float8Linear cannot be differentiated twice (create_graph=True): casting to float8 has no "
            "useful second derivative. Keep the layers that need one in high precision with "
            "module_filter_fn, or differentiate once"
        )


class Float8Matmul(torch.autograd.Function):
    """See the module's docstring. `grad_output`: delayed scaling's statistics of dy, for a single weight.

    Arguments after `x`: the weights; then (data, scale) of x_MK, x_KM, the joined w_NK, and each weight's
    w_KN. (None, None) stands for an operand in high precision, and for a w_KN that backward is to cast.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: ProductSpec, grad_output: OperandStatistics | None, x: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, ...]:
        n, recipe = spec.weights, spec.recipe
        weights, casts = rest[:n], rest[n:]
        (x_MK, x_MK_scale, x_KM, x_KM_scale, w_NK, w_NK_scale), w_KN = casts[:6], casts[6:]
        need_x, need_w = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3 : 3 + n])
        saved = [x if x_KM is None else x_KM, x_KM_scale] if need_w else [None, None]
        for i, weight in enumerate(weights):
            data, scale = w_KN[2 * i : 2 * i + 2]
            saved += [weight if data is None else data, scale] if need_x else [None, None]
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.grad_output = spec, grad_output
        joined = weights[0] if w_NK is None else w_NK
        assert joined is not None
        b = joined if recipe.output.b is not None else joined.to(x.dtype)
        y = matmul(
            _operand(x_MK, x_MK_scale, x), _operand(w_NK, w_NK_scale, b), recipe.output, x.dtype,
            emulate=spec.emulate,
        )  # fmt: skip
        sharding = spec.sharding
        if sharding is not None and sharding.pieces is not None:
            y = scatter_rows(y, sharding.pieces, sharding.size, sharding.group)
        sizes = [w.shape[0] for w in weights if w is not None]
        ys = [y] if n == 1 else list(y.split(sizes, dim=1))
        if spec.maxima:
            M = x.shape[0]
            for size in sizes:
                ys += [y.new_zeros((1, M), dtype=torch.float32), y.new_zeros((1, size), dtype=torch.float32)]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, (x, x_scale, *weights) = ctx.spec, ctx.saved_tensors
        n, recipe, sharding = spec.weights, spec.recipe, spec.sharding
        refuse_second_derivative()
        want_x, *want_w = needed_gradients(ctx, 2, 1 + n)
        dx: Tensor | None = None
        dws: list[Tensor | None] = [None] * n
        with torch.no_grad():
            for i in reversed(range(n)):  # the order in which the gradients of separate linears arrive
                dy = grads[i]
                if dy is None or not (want_x or want_w[i]):
                    continue
                dy_MN, dy_NM = cast_grad_output(
                    dy,
                    recipe,
                    for_grad_input=want_x,
                    for_grad_weight=want_w[i],
                    maxima=maxima_from_gradients(*grads[n + 2 * i : n + 2 * i + 2]) if spec.maxima else None,
                    sharding=sharding,
                    statistics=ctx.grad_output,
                    # Count saturated elements in one of two passes over the same graph.
                    count_saturated=want_x or not ctx.needs_input_grad[2],
                )
                if want_x:
                    w, w_scale = weights[2 * i : 2 * i + 2]
                    w_KN = _weight_for_grad_input(w, w_scale, recipe, sharding, dy.dtype)
                    part = matmul(dy_MN, w_KN, recipe.grad_input, dy.dtype, emulate=spec.emulate)
                    dx = part if dx is None else dx + part
                if want_w[i]:
                    if spec.remake is not None:
                        x_KM = spec.remake(recipe, x, x_scale, dy)
                    else:
                        x_KM = x.t() if x_scale is None else Quantized(x, x_scale)
                    dws[i] = matmul(dy_NM, x_KM, recipe.grad_weight, dy.dtype, emulate=spec.emulate)
        return None, None, dx, *dws, *[None] * (6 + 2 * n)


def _operand(data: Tensor | None, scale: Tensor | None, high_precision: Tensor) -> Quantized | Tensor:
    return high_precision if data is None or scale is None else Quantized(data, scale)


def _weight_for_grad_input(
    w: Tensor,
    scale: Tensor | None,
    recipe: Recipe,
    sharding: TensorParallelSpec | None,
    dtype: torch.dtype,
) -> Quantized | Tensor:
    """`w_KN`, cast now unless forward had its cast, so that no copy of a weight is kept between the two."""
    if scale is not None:
        return Quantized(w, scale)
    if recipe.grad_input.b is None:
        return w.t().to(dtype)
    return quantize(w.t(), recipe.grad_input.b, sharding.weight.transposed if sharding else None)


def prepare_input(x: Tensor, linear: nn.Linear) -> Tensor:
    """`x[..., K]` in the dtype in which `linear` computes. ValueError for another last dimension, TypeError
    for other dtypes.
    """
    kind, K = type(linear).__name__, linear.in_features
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"{kind} takes [..., {K}]; the input is {tuple(x.shape)}: its last dimension must be "
            f"in_features={K}"
        )
    return to_computing_dtype(x, kind)


def to_computing_dtype(x: Tensor, kind: str) -> Tensor:
    """`x` in autocast's dtype, if that is active. TypeError, naming `kind`, for dtypes not in `DTYPES`."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in DTYPES:
        raise TypeError(f"{kind} takes bfloat16, float16 or float32; the input is {x.dtype}: convert it")
    return x


def finish(y_MN: Tensor, tokens: torch.Size, bias: Tensor | None) -> Tensor:
    """A linear's output `[*tokens, N]` from the product `y_MN`."""
    # Not a view for autograd, like nn.Linear's output: FSDP2 warns about modules that return views.
    y = torch.ops.aten._unsafe_view(y_MN.contiguous(), (*tokens, y_MN.shape[1]))
    return y if bias is None else add_bias(y, bias)


def _flat(casts: Sequence[Quantized | None]) -> list[Tensor | None]:
    return [part for q in casts for part in ((None, None) if q is None else q)]


def multiply(
    spec: ProductSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    x_casts: Casts,
    w_NK: Quantized | Tensor | None,
    w_KN: Sequence[Quantized | None],
    grad_output: OperandStatistics | None = None,
) -> list[Product]:
    """`x[M, K]` times each of `weights[N_i, K]`; several values are slices of one tensor `[M, N]`.

    `w_NK`: the weights joined, cast if the recipe says so; None for one weight in high precision. `w_KN`:
    each weight's cast for grad_input, or None if backward is to make it.
    """
    joined = w_NK if isinstance(w_NK, Quantized) else (w_NK, None)
    # Views: `needed_gradients` can ask the engine about inner nodes of the graph only, not leaves.
    made = Float8Matmul.apply(
        spec,
        grad_output,
        x.view_as(x),
        *[w.view_as(w) for w in weights],
        *_flat(x_casts),
        *joined,
        *_flat(w_KN),
    )
    n = spec.weights
    if not spec.maxima:
        return [Product(value) for value in made]
    return [Product(made[i], made[n + 2 * i], made[n + 2 * i + 1]) for i in range(n)]
