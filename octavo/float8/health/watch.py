"""Measures one layer; its numbers leave a compiled graph as a probe's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from octavo.float8.casts.input_cache import compute_once
from octavo.float8.convert import plain_name
from octavo.float8.distributed.fsdp_gather import plain_parameter
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.health.measure import NUMBERS, Slot, cast_slots, measure
from octavo.float8.health.measurements import Measurement
from octavo.float8.linear import Float8Linear
from octavo.float8.recipe import Recipe

LayerFilter = Callable[[nn.Module, str], bool]


_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def _hidden_from_checkpointing() -> AbstractContextManager[Any]:
    """Scope hidden from selective checkpointing, which takes longer per operation than the operation."""
    if not torch.compiler.is_compiling() and isinstance(_get_current_dispatch_mode(), _SELECTIVE):
        return _pop_mode_temporarily()
    return nullcontext()


class _Tap(torch.autograd.Function):
    """Identity on y. The gradient of `probe` is the statistics of the input, then those of grad_output."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, of_input: Tensor, probe: Tensor, slots: tuple[Slot, ...], sample: int | None
    ) -> Tensor:
        ctx.save_for_backward(of_input)
        ctx.slots, ctx.sample = slots, sample
        # Not a view: views cannot be changed in place here, and FSDP2 warns about them.
        return torch.ops.aten._unsafe_view.default(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        (of_input,) = ctx.saved_tensors
        with torch.no_grad():
            of_dy = measure(dy.reshape(-1, dy.shape[-1]), ctx.slots, ctx.sample)
        return dy, None, torch.cat([of_input, of_dy]), None, None


class Watch:
    """Measures one layer; call it with the layer's input and output."""

    def __init__(
        self, layer: str, linear: nn.Linear, recipes: Sequence[Recipe], sample: int | None, *, frozen: bool
    ) -> None:
        if isinstance(linear, Float8Linear) and linear.tensor_parallel:
            raise ValueError(
                f"{layer} is sharded by tensor parallelism, so a rank has only a part of its operands. "
                "Measure the layer before parallelize_module, or exclude it with filter_fn"
            )
        self.layer, self.linear, self.sample = layer, linear, sample
        slots = [slot for recipe in recipes for slot in cast_slots(recipe)]
        self.input, self.weight, self.grad_output = (
            tuple(slot for slot in slots if slot.operand == operand)
            for operand in ("input", "weight", "grad_output")
        )
        self.frozen = frozen  # whether to measure layers whose output needs no gradient
        self.probe = self.new_probe(linear.weight.device)
        self.probes: list[Tensor] = []  # of an audit
        self.seen: list[Tensor] = []

    def start(self) -> None:
        self.seen = []
        if self.probe.device != self.linear.weight.device:
            self.probe = self.new_probe(self.linear.weight.device)

    def new_probe(self, device: torch.device) -> Tensor:
        size = NUMBERS * (len(self.input) + len(self.grad_output))
        probe = torch.zeros(size, dtype=torch.float64, device=device, requires_grad=True)
        probe.register_post_accumulate_grad_hook(self.take)
        return probe

    def take(self, probe: Tensor) -> None:
        assert probe.grad is not None
        self.seen.append(probe.grad)
        probe.grad = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not (y.requires_grad or self.frozen):
            return y
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.no_grad(), _hidden_from_checkpointing():
            of_input = compute_once(
                x,
                (self.input, self.sample),
                lambda: measure(x.detach().reshape(-1, x.shape[-1]), self.input, self.sample),
            )
        # Gradients of one probe are summed, but maxima must not be: eager code has a probe per call.
        probe = self.probe if torch.compiler.is_compiling() else self.new_probe(y.device)
        if self.frozen:
            self.probes.append(probe)
        return _Tap.apply(y, of_input, probe, self.grad_output, self.sample)

    def of_weight(self) -> Tensor:
        weight = plain_parameter(self.linear.weight.detach())
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return measure(whole, () if isinstance(whole, UnshardedWeight) else self.weight, self.sample)

    def hook(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return self(args[0], y)


def collect_rows(watches: Sequence[Watch], group: dist.ProcessGroup | None = None) -> tuple[Measurement, ...]:
    """The measurements of `watches`, copied from the device at once; over all ranks of `group`, if given."""
    watches = [watch for watch in watches if watch.seen]
    with torch.no_grad():
        pieces = [piece for watch in watches for piece in (watch.of_weight(), *watch.seen)]
    if not pieces:
        return ()
    device = watches[0].seen[0].device
    numbers = iter(torch.cat([piece.to(device) for piece in pieces]).tolist())

    def take(slots: Sequence[Slot]) -> list[list[float]]:
        return [[next(numbers) for _ in range(NUMBERS)] for _ in slots]

    measured: list[tuple[str, Slot, list[float]]] = []
    for watch in watches:
        has_weight = not isinstance(watch.linear.weight, UnshardedWeight)
        of_weight = list(zip(watch.weight, take(watch.weight), strict=True)) if has_weight else []
        slots = watch.input + watch.grad_output
        calls = [take(slots) for _ in watch.seen]
        combined = [(slot, _combine_calls([call[i] for call in calls])) for i, slot in enumerate(slots)]
        k = len(watch.input)
        ordered = [*combined[:k], *of_weight, *combined[k:]]
        measured += [(watch.layer, slot, seen) for slot, seen in ordered]
    if group is not None:
        by_rank = [
            seen for _, slot, seen in measured if slot.operand != "weight"
        ]  # a weight is the same on all
        for seen, whole in zip(by_rank, _combine_ranks(by_rank, device, group), strict=True):
            seen[:] = whole
    return tuple(_row(layer, slot, seen) for layer, slot, seen in measured)


def _combine_calls(seen: Sequence[Sequence[float]]) -> list[float]:
    """The numbers of several calls as one: the largest amax, and sums."""
    amaxes = [numbers[0] for numbers in seen]
    sums = [
        math.fsum(column) if all(map(math.isfinite, column)) else sum(column)
        for column in list(zip(*seen, strict=True))[1:]
    ]
    return [math.nan if any(map(math.isnan, amaxes)) else max(amaxes), *sums]


def _combine_ranks(
    seen: Sequence[Sequence[float]], device: torch.device, group: dist.ProcessGroup
) -> list[list[float]]:
    """`_combine_calls` over `group`. A NaN amax becomes infinite: not every backend's maximum keeps NaN."""
    numbers = torch.tensor(seen, dtype=torch.float64, device=device)
    amax = torch.nan_to_num(numbers[:, 0], nan=math.inf, posinf=math.inf).contiguous()
    sums = numbers[:, 1:].contiguous()
    dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(sums, group=group)
    return torch.cat([amax.unsqueeze(1), sums], dim=1).tolist()


def named_linears(model: nn.Module, kind: type[nn.Linear]) -> dict[str, nn.Linear]:
    """The linears of `model` by name, without what compiling and checkpointing add to names."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def _row(layer: str, slot: Slot, seen: Sequence[float]) -> Measurement:
    """The measurement of one cast from its numbers."""
    amax, values, nonfinite, flushed, saturated, signal, noise = seen
    share = 1 / values if values else 0.0
    return Measurement(
        layer=layer,
        recipe=slot.recipe,
        operand=slot.operand,
        gemms=slot.gemms,
        values=int(values),
        amax=amax,
        flushed=flushed * share,
        saturated=saturated * share,
        nonfinite=nonfinite * share,
        sqnr=_decibels(signal, noise),
    )


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
