"""The autograd function of every fused product: several weights, one input, one product in forward.

    forward     x[M, K] . (w_1 | w_2 | ...)[N, K]^T  ->  y_1[M, N_1], y_2[M, N_2], ...
    backward    dx = sum_i dy_i . w_i,   dw_i = dy_i^T . x

A weight's scales are per row or per block of rows, so concatenated casts of several weights equal the cast of
the concatenation, bit for bit, unless a block straddles two weights. With one scale per tensor they do not;
then the user may choose one scale for all (`shared_scales`).

dy's contraction runs over N, along which the scales of separate gradients differ from those of the joined
one. So gradients are multiplied one by one, in the order in which autograd would add them. Saved for backward
is what separate linears would save: one cast of the input, and the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.float8.fused.producer_maxima import maxima_from_gradients, quantize_with_maxima
from octavo.float8.linear import needed_gradients
from octavo.float8.matmul import matmul
from octavo.float8.quantize import Quantized, quantize
from octavo.float8.recipe import Gemm, Recipe

HIGH_PRECISION = Recipe("high_precision", Gemm(None, None), Gemm(None, None), Gemm(None, None))


class Product(NamedTuple):
    """A linear's output `value[..., N]`, and two more outputs whose gradients are the maxima of value's
    gradient, if its consumer computes them (`producer_maxima.py`).
    """

    value: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class ProductSpec:
    """The arguments of a product that are not tensors; `maxima`: whether it has outputs for maxima."""

    recipe: Recipe
    emulate: bool | None
    weights: int
    maxima: bool


def _pair(q: Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if q is None else (q.data, q.scale)


class JoinedMatmul(torch.autograd.Function):
    """See the module's docstring. Arguments after `x`: the weights; then (data, scale) or (None, None) of
    x_MK, x_KM, the joined w_NK, and each weight's w_KN.
    """

    @staticmethod
    def forward(ctx: Any, spec: ProductSpec, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        n, recipe = spec.weights, spec.recipe
        weights, casts = rest[:n], rest[n:]
        (x_MK, x_MK_scale, x_KM, x_KM_scale, w_NK, w_NK_scale), w_KN = casts[:6], casts[6:]
        need_x, need_w = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2 : 2 + n])
        keep = [x if x_KM is None else x_KM, x_KM_scale] if need_w else [None, None]
        for i, weight in enumerate(weights):
            data, scale = w_KN[2 * i], w_KN[2 * i + 1]
            keep += [weight if data is None else data, scale] if need_x else [None, None]
        ctx.save_for_backward(*keep)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.shape, ctx.dtype = spec, x.shape, x.dtype
        assert w_NK is not None
        a: Quantized | Tensor = x if x_MK is None or x_MK_scale is None else Quantized(x_MK, x_MK_scale)
        b: Quantized | Tensor = w_NK.to(x.dtype) if w_NK_scale is None else Quantized(w_NK, w_NK_scale)
        y = matmul(a, b, recipe.output, x.dtype, emulate=spec.emulate)
        ctx.sizes = sizes = [w.shape[0] for w in weights if w is not None]
        ys = [y] if n == 1 else list(y.split(sizes, dim=1))
        if spec.maxima:
            M = x.shape[0]
            for size in sizes:
                ys += [y.new_zeros((1, M), dtype=torch.float32), y.new_zeros((1, size), dtype=torch.float32)]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, saved = ctx.spec, ctx.saved_tensors
        n, recipe = spec.weights, spec.recipe
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused linears cannot be differentiated twice (create_graph=True), because of the casts to "
                "float8: call the modules one by one where you need that"
            )
        want_x, *want_w = needed_gradients(ctx, 1, 1 + n)
        x, x_scale = saved[:2]
        dx: Tensor | None = None
        dws: list[Tensor | None] = [None] * n
        with torch.no_grad():
            for i in reversed(range(n)):  # the order in which the gradients of separate linears arrive
                dy = grads[i]
                if dy is None or not (want_x or want_w[i]):
                    continue
                maxima = maxima_from_gradients(*grads[n + 2 * i : n + 2 * i + 2]) if spec.maxima else None
                dy_MN, dy_NM = quantize_with_maxima(
                    dy,
                    recipe.grad_input.a if want_x else None,
                    recipe.grad_weight.a if want_w[i] else None,
                    maxima,
                )
                if want_x:
                    w, w_scale = saved[2 + 2 * i : 4 + 2 * i]
                    part = matmul(
                        dy_MN, _w_KN(w, w_scale, recipe, dy.dtype), recipe.grad_input, dy.dtype,
                        emulate=spec.emulate,
                    )  # fmt: skip
                    dx = part if dx is None else dx + part
                if want_w[i]:
                    x_KM = x.t() if x_scale is None else Quantized(x, x_scale)
                    dws[i] = matmul(dy_NM, x_KM, recipe.grad_weight, dy.dtype, emulate=spec.emulate)
            if want_x and dx is None:
                dx = torch.zeros(ctx.shape, dtype=ctx.dtype, device=saved[2].device)
        return None, dx, *dws, *[None] * (6 + 2 * n)


def _w_KN(w: Tensor, scale: Tensor | None, recipe: Recipe, dtype: torch.dtype) -> Quantized | Tensor:
    if scale is not None:
        return Quantized(w, scale)
    if recipe.grad_input.b is None:
        return w.t().to(dtype)
    return quantize(w.t(), recipe.grad_input.b)


def multiply_joined(
    spec: ProductSpec,
    x: Tensor,
    weights: list[Tensor],
    x_casts: tuple[Quantized | None, Quantized | None],
    w_NK: Quantized | Tensor,
    w_KN: list[Quantized | None],
) -> list[Product]:
    """`x[M, K]` times each of `weights[N_i, K]`. `w_NK`: the weights joined, cast if the recipe says so.

    The values are slices of one tensor `[M, N]`.
    """
    joined = w_NK if isinstance(w_NK, Quantized) else (w_NK, None)
    casts = [*_pair(x_casts[0]), *_pair(x_casts[1]), *joined]
    for q in w_KN:
        casts += _pair(q)
    # Views: `needed_gradients` can ask the engine about inner nodes of the graph only, not leaves.
    made = JoinedMatmul.apply(spec, x.view_as(x), *[w.view_as(w) for w in weights], *casts)
    n = spec.weights
    if not spec.maxima:
        return [Product(value) for value in made]
    return [Product(made[i], made[n + 2 * i], made[n + 2 * i + 1]) for i in range(n)]
