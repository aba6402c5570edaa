"""Linears with one input: its cast is shared, and their outputs are one product if possible.

One product reads the input once and runs faster than several narrow ones. The trade-off is memory layout: the
weights' casts are slices of one buffer, and the outputs are slices of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.float8.casts.operands import (
    cast_input,
    cast_weight,
    cast_weights,
    join,
    weight_operands,
    why_not_joined,
)
from octavo.float8.casts.producer_maxima import Maxima, kernels_support
from octavo.float8.compiled.bias import add_bias
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.linear import Float8Linear
from octavo.float8.product import Product, ProductSpec, multiply, prepare_input
from octavo.float8.quantize import Casts, Quantized
from octavo.float8.recipe import FULL, Gemm, Recipe

HIGH_PRECISION = Recipe("high_precision", Gemm(None, None), Gemm(None, None), Gemm(None, None))


class Remake(NamedTuple):
    """`ProductSpec.remake`, and the two tensors that it takes."""

    function: Callable[[Recipe, Tensor, Tensor, Tensor], Quantized | Tensor]
    sources: tuple[Tensor, Tensor]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class SharedInput:
    """Computes `[linear(x) for linear in linears]` from one cast of x, by one product if possible.

    The linears are all `Float8Linear`s of one recipe, or all plain `nn.Linear`s, with the same in_features.
    Linears that cannot be bypassed (see `why_called`) are called one by one; then this object changes
    nothing.

    shared_scales: for recipes with one scale per tensor (tensorwise), cast the joined weights with one scale.
    This changes numerics: a weight much smaller than the others keeps fewer bits. Raises ValueError if the
    recipe has no such scale.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, shared_scales: bool = False) -> None:
        self.linears = tuple(linears)
        if not self.linears:
            raise ValueError("SharedInput needs at least one linear layer")
        widths = {linear.in_features for linear in self.linears}
        if len(widths) > 1:
            raise ValueError(f"linears of one input must have one in_features; these have {sorted(widths)}")
        self.shared_scales = shared_scales
        self.joined_casts: Quantized | None = None  # the joined weights', within `cast_weights_once`
        first = self.linears[0]
        cast = first.recipe.output.b if isinstance(first, Float8Linear) else None
        if shared_scales and (cast is None or cast.block != (FULL, FULL)):
            raise ValueError("shared_scales requires a recipe with one scale per weight, as tensorwise")
        self._adopt()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"joined_casts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._adopt()

    def _adopt(self) -> None:
        """Make each linear refer to this object; a copied linear refers to none."""
        for linear in self.linears:
            if isinstance(linear, Float8Linear):
                linear.shared_input = self

    @property
    def recipe(self) -> Recipe:
        first = self.linears[0]
        return first.recipe if isinstance(first, Float8Linear) else HIGH_PRECISION

    def why_called(self) -> str | None:
        """Why the linears are called one by one; None if their casts and products are made here."""
        if len({linear.recipe if isinstance(linear, Float8Linear) else None for linear in self.linears}) > 1:
            return "they have different recipes"
        if len({linear.emulate for linear in self.linears if isinstance(linear, Float8Linear)}) > 1:
            return "some are emulated and some are not"
        for linear in self.linears:
            if type(linear).forward is not _FORWARD[isinstance(linear, Float8Linear)]:
                return "one has a forward of its own"
            if isinstance(linear.weight, DTensor):
                return "their weights are sharded"
            if has_hooks(linear):
                return "one has hooks"
            if getattr(linear, "statistics", None) is not None:  # its forward records statistics
                return "one uses delayed scaling"
        return None

    def why_separate(self) -> str | None:
        """Why the linears are not one product; None if they are."""
        why = self.why_called()
        if why is not None or len(self.linears) == 1:
            return why
        if self.shared_scales:
            gathered = any(isinstance(linear.weight, UnshardedWeight) for linear in self.linears)
            return "weights gathered in float8 have one scale each" if gathered else None
        return why_not_joined(self.recipe.output.b, [linear.out_features for linear in self.linears])

    def __call__(
        self,
        x: Tensor,
        *,
        maxima: Maxima | None = None,
        note_maxima: bool = False,
        remake: Remake | None = None,
    ) -> tuple[Product, ...]:
        """The linears' outputs for `x[..., K]`. `maxima`: those of x's rows and columns, if known.
        `remake`: how backward makes x's cast for grad_weight again, which then is not kept.

        note_maxima: the consumer of the outputs computes the maxima of their gradients, and receives the full
        `Product`. Values of one product are slices of one tensor: not contiguous, and keeping one keeps all.
        """
        if self.why_called() is not None:
            return tuple(Product(linear(x)) for linear in self.linears)
        given, x = x, prepare_input(x, self.linears[0])
        x_MK = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        weights: list[Tensor] = [linear.weight for linear in self.linears]
        first = self.linears[0]
        spec = ProductSpec(
            self.recipe,
            first.emulate if isinstance(first, Float8Linear) else None,
            maxima=note_maxima and kernels_support(x_MK),
            remake=None if remake is None else remake.function,
        )
        trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        x_casts = cast_input(
            x_MK,
            self.recipe,
            for_grad_weight=trains and remake is None,
            owner=given,
            pin=any(isinstance(linear, Float8Linear) and linear.keep_input for linear in self.linears),
            maxima=maxima,
        )
        if remake is not None:
            x_casts = x_casts[0], Quantized(*remake.sources)
        if len(weights) > 1 and self.why_separate() is None:
            w_NK, w_KN = self._joined_operands(x.dtype)
            products = multiply(replace(spec, weights=len(weights)), x_MK, weights, x_casts, w_NK, w_KN)
        else:
            products = []
            for linear in self.linears:
                first_cast, second_cast = self._operands(linear)
                products += multiply(spec, x_MK, [linear.weight], x_casts, first_cast, [second_cast])
        return tuple(
            product._replace(value=self._finish(linear, x, product.value))
            for linear, product in zip(self.linears, products, strict=True)
        )

    def _finish(self, linear: nn.Linear, x: Tensor, y_MN: Tensor) -> Tensor:
        y = y_MN.view(*x.shape[:-1], linear.out_features)
        y = y if linear.bias is None else add_bias(y, linear.bias)
        if isinstance(linear, Float8Linear) and linear.watch is not None:
            return linear.watch(x, y)
        return y

    def _operands(self, linear: nn.Linear) -> Casts:
        """One linear's weight for the output and for grad_input, as far as it is cast."""
        if not isinstance(linear, Float8Linear):
            return None, None
        return linear.weight_cache.get(linear.weight) or weight_operands(linear.weight, linear.recipe)

    @torch.no_grad()
    def _joined_operands(self, dtype: torch.dtype) -> tuple[Quantized | Tensor, list[Quantized | None]]:
        """The joined weights for the output, and each weight's cast for grad_input, if there is one."""
        weights = [linear.weight for linear in self.linears]
        if self.recipe.output.b is None:
            return _joined([weight.to(dtype) for weight in weights]), [None] * len(weights)
        members = [linear for linear in self.linears if isinstance(linear, Float8Linear)]
        cached = [linear.weight_cache.get(linear.weight) for linear in members]
        if self.joined_casts is not None and all(casts is not None for casts in cached):
            return self.joined_casts, [casts[1] for casts in cached if casts is not None]
        if self.shared_scales:
            return self._cast_with_one_scale(), [None] * len(weights)
        if any(isinstance(weight, UnshardedWeight) for weight in weights):
            joined, casts_ = join([weight_operands(weight, self.recipe) for weight in weights], self.recipe)
        else:
            joined, casts_ = cast_weights(weights, self.recipe, for_grad_input=False)
        return joined, [second for _, second in casts_]

    def _cast_with_one_scale(self) -> Quantized:
        joined = _joined([linear.weight for linear in self.linears])
        whole, _ = cast_weight(joined, self.recipe, for_grad_input=False)
        assert whole is not None
        return whole

    def cast_joined_weights(self) -> None:
        """Cast the linears' weights into one buffer, and store each one's part (`cast_weights_once`)."""
        members = [linear for linear in self.linears if isinstance(linear, Float8Linear)]
        weights = [linear.weight for linear in members]
        joins = self.recipe.output.b is not None and len(members) > 1 and self.why_separate() is None
        if not joins or not all(map(_is_castable, weights)):
            return
        if self.shared_scales:
            self.joined_casts = self._cast_with_one_scale()
            return
        current = [m.weight_cache.casts for m in members if m.weight_cache.is_current(m.weight)]
        if len(current) == len(members):  # made by the optimizer
            self.joined_casts, casts = join([made for made in current if made is not None], self.recipe)
        else:
            self.joined_casts, casts = cast_weights(weights, self.recipe, for_grad_input=True)
        for linear, weight, made in zip(members, weights, casts, strict=True):
            linear.weight_cache.store(weight, made)

    def release_joined_casts(self) -> None:
        self.joined_casts = None


def _is_castable(weight: Tensor) -> bool:
    """Whether `weight` is neither computed at each use nor gathered in float8."""
    return isinstance(weight, nn.Parameter) and not isinstance(weight, UnshardedWeight)


_FORWARD = {False: nn.Linear.forward, True: Float8Linear.forward}


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
