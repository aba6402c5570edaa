"""Delayed scaling: float8 scales from the previous step's maxima, for all float8 layers of a model.

    scales = DelayedScaling(model)          # after the model is on its device
    for batch in batches:
        loss(model(batch)).backward()       # once or more
        optimizer.step()
        report = scales.end_step()

During a step every layer casts its input and its output's gradient with the previous step's maximum, and
records the current one (`delayed_statistics.py`). `end_step` makes the current maxima the next step's, over
all microbatches and ranks, so that a scale does not depend on how a batch was distributed. It costs one
reduction of the maxima and one of the counts, and synchronizes the host.

The first step is just in time, as there is no previous one. So is the step after one in which more than
`bound` of any operand's elements saturated, which measures maxima anew. This fallback is for the whole model:
per layer, compiled code would need a graph for each set of layers; this way there are two. A maximum that is
zero or non-finite is ignored.

Without a `DelayedScaling` the recipe is tensorwise, just in time. State dicts of the model do not change;
`DelayedScaling.state_dict` has what a run needs to resume bit for bit, by layer name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from octavo.float8.casts.delayed_statistics import LayerStatistics, OperandStatistics
from octavo.float8.convert import plain_name
from octavo.float8.distributed.amax_reduction import all_reduce_amax
from octavo.float8.linear import Float8Linear
from octavo.float8.recipe import Cast, When

DEFAULT_BOUND = 1e-3


@dataclass(frozen=True)
class SaturationReport:
    """Saturation in one step.

    saturated: the largest share of saturated elements among all operands. operand: the operand with that
    share. just_in_time: whether this step was cast just in time. falls_back: whether the next one will be.
    """

    saturated: float
    operand: str
    just_in_time: bool
    falls_back: bool


def _is_delayed(cast: Cast | None) -> bool:
    return cast is not None and cast.when is When.PREVIOUS_STEP


class DelayedScaling:
    """Keeps the scales of the float8 layers in `model` whose recipes use delayed scaling.

    A module may have an attribute `same_input`, tuples of names of its children that read one tensor; these
    share its cast. `device`: where the layers compute; None means the device of their weights, which must not
    be meta. `bound`: the share of saturated elements above which the next step is cast just in time. Raises
    ValueError for a bound outside [0, 1].
    """

    def __init__(
        self, model: nn.Module, *, bound: float = DEFAULT_BOUND, device: torch.device | None = None
    ) -> None:
        if not 0 <= bound <= 1:
            raise ValueError(f"bound = {bound} must be a share of elements, from 0 to 1")
        self.bound = bound
        self.statistics: dict[str, OperandStatistics] = {}
        self.device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
        self._names: list[str] | None = None
        self._delayed = False  # whether the current step casts with the previous one's maxima
        self._amax: dict[str, float] = {}
        shared: dict[int, str] = {}
        for name, parent in model.named_modules():
            for group in getattr(parent, "same_input", ()):
                first = f"{name}.{group[0]}" if name else group[0]
                shared |= {id(getattr(parent, child, None)): plain_name(first) for child in group}
        for name, linear in model.named_modules():
            if isinstance(linear, Float8Linear):
                self._install(linear, plain_name(name), shared.get(id(linear), plain_name(name)))

    def _install(self, linear: Float8Linear, name: str, reads_with: str) -> None:
        def operand(delayed: bool, key: str) -> OperandStatistics | None:
            if not delayed:
                return None
            if key not in self.statistics:
                self.statistics[key] = OperandStatistics.on(self.device)
            return self.statistics[key]

        linear.statistics = LayerStatistics(
            operand(_is_delayed(linear.recipe.output.a), f"{reads_with}.input"),
            operand(_is_delayed(linear.recipe.grad_input.a), f"{name}.grad_output"),
        )

    @torch.no_grad()
    def end_step(self) -> SaturationReport:
        """Make this step's maxima the next step's scales. Every rank must call it, whatever layers it has.

        The host waits for the device once, and the number of launches does not grow with the operands.
        """
        measured = self._measured()
        shares = {name: s / n for name, (_, s, n) in measured.items() if n}
        worst = max(shares, key=lambda name: shares[name], default="")
        falls_back = bool(shares) and shares[worst] > self.bound
        for name, (amax, _, _) in measured.items():
            if math.isfinite(amax) and amax > 0:
                self._amax[name] = amax
        report = SaturationReport(
            shares.get(worst, 0.0),
            worst,
            just_in_time=not self._delayed,
            falls_back=falls_back,
        )
        self._begin(just_in_time=falls_back)
        return report

    def _begin(self, *, just_in_time: bool) -> None:
        self._delayed = not just_in_time and bool(self._amax)
        operands = list(self.statistics.values())
        if not operands:
            return
        for name, operand in self.statistics.items():
            operand.valid = self._delayed and name in self._amax
        known = [name for name in self.statistics if name in self._amax]
        if known:
            amax = torch.tensor([self._amax[name] for name in known]).to(self.device, non_blocking=True)
            previous = [self.statistics[name].previous_amax for name in known]
            torch._foreach_copy_(previous, list(amax.view(-1, 1, 1).unbind()))
        torch._foreach_zero_([operand.current_amax for operand in operands])
        torch._foreach_zero_([operand.counts for operand in operands])

    def _measured(self) -> dict[str, tuple[float, float, float]]:
        """Maximum, saturated and total elements of each operand of any rank."""
        single = not dist.is_initialized() or dist.get_world_size() == 1
        if self._names is None:
            by_rank: list[list[str]] = [list(self.statistics)]
            if not single:
                by_rank = [[] for _ in range(dist.get_world_size())]
                dist.all_gather_object(by_rank, list(self.statistics))
            self._names = sorted({name for names in by_rank for name in names})
        if not self._names:
            return {}
        absent = OperandStatistics.on(self.device)
        here = [self.statistics.get(name, absent) for name in self._names]
        maxima = torch.cat([o.current_amax for o in here])
        counts = torch.stack([o.counts for o in here])
        if not single:
            assert dist.group.WORLD is not None
            maxima = all_reduce_amax(maxima, [dist.group.WORLD.group_name])
            dist.all_reduce(counts)
        numbers = torch.cat([maxima.double(), counts.double()], dim=1).tolist()  # counts are exact up to 2^53
        return {name: (amax, s, n) for name, (amax, s, n) in zip(self._names, numbers, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The next step's scales as JSON-compatible data, equal on every rank."""
        return {"just_in_time": not self._delayed, "amax": dict(self._amax)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. Operands that it lacks are cast just in time at first."""
        self._amax = {name: float(amax) for name, amax in state["amax"].items()}
        self._begin(just_in_time=state["just_in_time"])
