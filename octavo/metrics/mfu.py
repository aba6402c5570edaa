"""Utilization of the hardware's peak: three figures that differ in what they count.

    mfu         the model's FLOPs against the high-precision peak, whatever the recipe: comparable with
                published figures (PaLM, arXiv:2204.02311, appendix B); with float8 it can exceed 100 %
    mfu_mixed   the same FLOPs, each product against the peak of the precision that it ran in; at most 100 %
    hfu         as mfu_mixed, plus the FLOPs that activation checkpointing recomputes

With F_p FLOPs per token in precision p, peak P_p of that precision and r tokens per second, mfu_mixed and hfu
are r * sum(F_p / P_p). Emulated float8 counts as float32, the precision it runs in. If the peak of a
precision that ran is unknown, so is the figure.

The precision is tracked for each linear layer; attention and all other work counts as high precision. Only
the model's FLOPs count, not those of padding, casts and the optimizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from octavo.config.schema import ActivationCheckpoint
from octavo.metrics.device import Peak

LinearPrecisions = Mapping[str, tuple[str, str, str]]
"""Full name of a linear layer -> the precisions of its output, grad_input and grad_weight GEMMs."""


@dataclass(frozen=True)
class Work:
    """FLOPs per token, by the precision that they run in ("bfloat16", "float32", "float8").

    model: forward and backward. again: recomputation by activation checkpointing; None if unknown.
    """

    model: Mapping[str, float]
    again: Mapping[str, float] | None

    @property
    def total(self) -> float:
        """FLOPs per token of forward and backward, over all precisions."""
        return sum(self.model.values())


@dataclass(frozen=True)
class Utilization:
    """Percent of the peak, as the module defines them; None if unknown."""

    mfu: float | None
    mfu_mixed: float | None
    hfu: float | None


def utilization(work: Work, tokens_per_second: float, peak: Peak) -> Utilization:
    """The three figures of one device at `tokens_per_second`."""

    def share(*parts: Mapping[str, float] | None) -> float | None:
        seconds = 0.0
        for part in parts:
            if part is None:
                return None
            for precision, flops in part.items():
                if flops and precision not in peak.by_precision:
                    return None
                seconds += flops / peak.by_precision[precision] if flops else 0.0
        return 100 * tokens_per_second * seconds

    return Utilization(
        mfu=None if peak.flops is None else 100 * tokens_per_second * work.total / peak.flops,
        mfu_mixed=share(work.model),
        hfu=share(work.model, work.again),
    )


def recomputed_products(
    products: Sequence[str], attention: str, settings: ActivationCheckpoint, number: int, *, to_the_end: bool
) -> list[str]:
    """Which of a layer's forward `products` (in execution order) activation checkpointing recomputes.

    number: index of the layer, from 0. to_the_end: whether the last product is recomputed too. Backward does
    not need its result, so recomputation stops before it, except in an eager layer that saves its operands
    only after the product (`Float8Linear`).
    """
    if settings.mode == "none":
        return []
    ends = list(products if to_the_end else products[:-1])
    if settings.mode == "full":
        return ends
    if settings.selective_ac_option != "op":
        return ends if number % int(settings.selective_ac_option) == 0 else []
    linears = [name for name in products if name != attention]
    kept = {attention, *linears[::2]}  # as distributed/activation_checkpoint.py counts them
    return [name for name in ends if name not in kept]


def work_of(
    model: nn.Module,
    flops_per_token: float,
    precisions: LinearPrecisions,
    high: str,
    settings: ActivationCheckpoint,
    layer: tuple[str, Sequence[tuple[str, float]]] | None,
    *,
    to_the_end: bool,
) -> Work:
    """The work of a whole model, before it is sharded.

    Args:
        flops_per_token: forward and backward, as the model's spec counts them.
        precisions: of the linear layers. high: the precision of everything else.
        settings: of activation checkpointing.
        layer: the result of `ModelSpec.layer_products`, or None.
        to_the_end: as in `recomputed_products`.
    """
    products = {name: 2.0 * m.weight.numel() for name, m in _linears(model).items()}
    counted = 3 * sum(products.values())
    # A model whose linears see only some of the tokens (a mixture of experts) counts fewer FLOPs itself.
    scale = min(1.0, flops_per_token / counted) if counted else 1.0
    by_precision = {high: max(0.0, flops_per_token - counted)}
    for name, flops in products.items():
        for precision in precisions.get(name, (high,) * 3):
            by_precision[precision] = by_precision.get(precision, 0.0) + scale * flops
    if settings.mode == "none":
        return Work(by_precision, {})
    if layer is None:
        return Work(by_precision, None)

    prefix, runs = layer
    other = dict(runs)
    attention = next((name for name, _ in runs if f"{prefix}0.{name}" not in products), "")
    again: dict[str, float] = {}
    number = 0
    while any(f"{prefix}{number}.{name}" in products for name in other):
        for name in recomputed_products(list(other), attention, settings, number, to_the_end=to_the_end):
            linear = f"{prefix}{number}.{name}"
            precision = precisions.get(linear, (high,))[0]
            again[precision] = again.get(precision, 0.0) + products.get(linear, other[name])
        number += 1
    return Work(by_precision, again)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
