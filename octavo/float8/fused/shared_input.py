"""Linears with one input as one product (`product.py`).

One product reads the input once and runs faster than several narrow ones. The trade-off is memory layout: the
weights' casts are concatenated, and the outputs are slices of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.float8.compiled.bias import add_bias
from octavo.float8.compiled.pin_saved import pin_saved
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.fused.producer_maxima import Maxima, kernels_support, quantize_with_maxima
from octavo.float8.fused.product import HIGH_PRECISION, Product, ProductSpec, multiply_joined
from octavo.float8.linear import DTYPES, Float8Linear, cast_input, cast_weight, only_casts, weight_operands
from octavo.float8.quantize import Casts, Quantized
from octavo.float8.recipe import FULL, Cast, Recipe


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not_joined(cast: Cast | None, rows: Sequence[int]) -> str | None:
    """Why the joined casts of weights with `rows` differ from the cast of the joined weights; or None."""
    if cast is None or cast.block[0] == 1:
        return None
    if cast.block[0] == FULL:
        return "each has one scale (shared_scales=True uses one for all, which changes numerics)"
    if any(n % cast.block[0] for n in rows[:-1]):
        return f"blocks of {cast.block[0]} rows would straddle two of them ({', '.join(map(str, rows))} rows)"
    return None


class SharedInput:
    """Computes `[linear(x) for linear in linears]` by one product.

    The linears are all `Float8Linear`s of one recipe, or all plain `nn.Linear`s, with the same in_features.
    Linears that cannot be joined (see `why_separate`) are called one by one; then this object changes
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
        self.joined_casts: Quantized | None = None  # the joined weights, within `cast_weights_once`
        first = self.linears[0]
        cast = first.recipe.output.b if isinstance(first, Float8Linear) else None
        if shared_scales and (cast is None or cast.block != (FULL, FULL)):
            raise ValueError("shared_scales requires a recipe with one scale per weight, as tensorwise")
        for linear in self.linears:
            if isinstance(linear, Float8Linear):
                linear.shared_input = self

    @property
    def recipe(self) -> Recipe:
        first = self.linears[0]
        return first.recipe if isinstance(first, Float8Linear) else HIGH_PRECISION

    def why_separate(self) -> str | None:
        """Why the linears are called one by one; None if they are one product."""
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
        if len(self.linears) == 1:
            return None
        if self.shared_scales:
            gathered = any(isinstance(linear.weight, UnshardedWeight) for linear in self.linears)
            return "weights gathered in float8 have one scale each" if gathered else None
        return why_not_joined(self.recipe.output.b, [linear.out_features for linear in self.linears])

    def __call__(
        self, x: Tensor, *, maxima: Maxima | None = None, note_maxima: bool = False
    ) -> tuple[Product, ...]:
        """The linears' outputs for `x[..., K]`. `maxima`: those of x's rows and columns, if known.

        note_maxima: the consumer of the outputs computes the maxima of their gradients, and receives the full
        `Product`. Values are slices of one tensor: not contiguous, and keeping one keeps all.
        """
        if self.why_separate() is not None:
            return tuple(Product(linear(x)) for linear in self.linears)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype not in DTYPES or x.shape[-1] != self.linears[0].in_features:
            raise ValueError(
                f"linears of {self.linears[0].in_features} input features take that width in bfloat16, "
                f"float16 or float32; the input is {tuple(x.shape)} in {x.dtype}"
            )
        recipe, lead = self.recipe, x.shape[:-1]
        x_MK = x.reshape(math.prod(lead), x.shape[-1])
        weights: list[Tensor] = [linear.weight for linear in self.linears]
        spec = ProductSpec(recipe, self._emulate(), len(weights), note_maxima and kernels_support(x_MK))
        grads = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        with torch.no_grad():
            x_casts = self._cast_input(x_MK, maxima, for_grad_weight=grads)
            w_NK, w_KN = self._operands(x.dtype)
        products = multiply_joined(spec, x_MK, weights, x_casts, w_NK, w_KN)
        return tuple(
            made._replace(value=self._finish(linear, x, made.value.view(*lead, linear.out_features)))
            for linear, made in zip(self.linears, products, strict=True)
        )

    def _emulate(self) -> bool | None:
        first = self.linears[0]
        return first.emulate if isinstance(first, Float8Linear) else None

    def _finish(self, linear: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        y = y if linear.bias is None else add_bias(y, linear.bias)
        if isinstance(linear, Float8Linear) and linear.watch is not None:
            return linear.watch(x, y)
        return y

    def _cast_input(self, x_MK: Tensor, maxima: Maxima | None, *, for_grad_weight: bool) -> Casts:
        recipe = self.recipe
        row, col = recipe.output.a, recipe.grad_weight.b if for_grad_weight else None
        if maxima is None:
            casts = cast_input(x_MK.detach(), recipe, for_grad_weight=for_grad_weight)
        else:
            casts = only_casts(*quantize_with_maxima(x_MK, row, col, maxima))
        must_pin = any(isinstance(linear, Float8Linear) and linear.keep_input for linear in self.linears)
        if torch.compiler.is_compiling() and (must_pin or x_MK.dtype == torch.float32):
            return pin_saved(casts, one_cast=row == col and row is not None and row.square)
        return casts

    def _operands(self, dtype: torch.dtype) -> tuple[Quantized | Tensor, list[Quantized | None]]:
        """The joined weights for the output, and each weight's cast for grad_input, if there is one."""
        recipe = self.recipe
        no_casts: list[Quantized | None] = [None] * len(self.linears)
        if recipe.output.b is None:
            return _joined_plain([linear.weight.to(dtype) for linear in self.linears]), no_casts
        cached = [
            linear.current_weight_casts() for linear in self.linears if isinstance(linear, Float8Linear)
        ]
        if self.joined_casts is not None and all(casts is not None for casts in cached):
            return self.joined_casts, [casts[1] for casts in cached if casts is not None]
        if self.shared_scales and len(self.linears) > 1:
            joined = _joined_plain([linear.weight for linear in self.linears])
            whole, _ = cast_weight(joined, recipe, for_grad_input=False)
            assert whole is not None
            return whole, no_casts
        casts = [weight_operands(linear.weight.detach(), recipe) for linear in self.linears]
        return join([casts_[0] for casts_ in casts]), [casts_[1] for casts_ in casts]

    def join_weight_casts(self) -> None:
        """Join the linears' cached casts; these become slices of the joined one (`cast_weights_once`)."""
        members = [linear for linear in self.linears if isinstance(linear, Float8Linear)]
        casts = [linear.weight_casts for linear in members]
        if self.why_separate() is not None or not casts or any(c is None or c[0] is None for c in casts):
            return
        if self.shared_scales and len(members) > 1:
            self.joined_casts, _ = cast_weight(
                _joined_plain([member.weight for member in members]), self.recipe, for_grad_input=False
            )
            return
        self.joined_casts = joined = join([c[0] for c in casts if c is not None])
        start, start_scale = 0, 0
        for linear, old in zip(members, casts, strict=True):
            assert old is not None
            assert old[0] is not None
            rows, blocks = linear.out_features, old[0].scale.shape[0]
            part = Quantized(joined.data.narrow(0, start, rows), joined.scale.narrow(0, start_scale, blocks))
            linear.weight_casts = part, _second(old[0], old[1], part)
            start, start_scale = start + rows, start_scale + blocks

    def release_weight_casts(self) -> None:
        self.joined_casts = None


_FORWARD = {False: nn.Linear.forward, True: Float8Linear.forward}


def _second(first: Quantized, second: Quantized | None, new: Quantized) -> Quantized | None:
    """`second`, as a view of `new` if it was the transpose of `first` in the same memory."""
    storages = (q.data.untyped_storage()._cdata for q in (first, second) if q is not None)
    if second is None or len(set(storages)) > 1:  # not by address: fake tensors have none
        return second
    return Quantized(new.data.t(), new.scale.t())


def _joined_plain(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])


def join(casts: Sequence[Quantized | None]) -> Quantized:
    """Casts of weights `[N_i, K]`, concatenated along N."""
    present = [q for q in casts if q is not None]
    if len(present) == 1:
        return present[0]
    data = torch.cat([q.data.view(torch.uint8) for q in present]).view(present[0].data.dtype)
    return Quantized(data, torch.cat([q.scale for q in present]))
