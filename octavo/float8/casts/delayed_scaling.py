"""Scales from the step before, for all float8 layers of a model: what is decided between two steps.

    scales = DelayedScaling(model)          # after the model has its memory
    for batch in batches:
        loss(model(batch)).backward()     # once or more
        optimizer.step()
        report = scales.end_step()

During a step every layer casts its input and its output's gradient with the maximum of the step before, and
notes its own (`operand.py`). `end_step` makes that the next step's: over all microbatches, and over all
ranks, so that a scale does not depend on how a batch was laid out. It costs one reduction of the maxima and
one of the counts, and the host waits for the numbers.

The first step is just in time, as nothing is known. So is the step after one in which more than `bound` of
any operand's elements saturated: its maxima are then measured anew before anything is cast with them. That
holds for the whole model, since compiled code would otherwise come in as many forms as there are sets of
layers; there are two. A maximum that is zero or no finite number is not taken over.

Without a `DelayedScaling` the recipe is tensorwise, just in time. State dicts of the model do not change;
`state_dict` here holds what a run that resumes bit for bit needs, by the layers' names.
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
    """What a step showed. saturated: the share of saturated elements of the worst operand, which is called
    `worst`. just_in_time: whether this step was cast just in time; falls_back: whether the next is.
    """

    saturated: float
    operand: str
    just_in_time: bool
    falls_back: bool


def _before(cast: Cast | None) -> bool:
    return cast is not None and cast.when is When.PREVIOUS_STEP


class DelayedScaling:
    """Keeps the scales of the float8 layers in `model` whose recipes ask for the previous step's.

    A module may say in `same_input`, tuples of its children's names, which of them read one tensor; they then
    share its cast. `device` is where the layers compute; None: where their weights are, which then must have
    their memory. `bound` is the share of saturated elements, above which the next step is cast just in time.
    Raises ValueError for a bound that is no share.
    """

    def __init__(
        self, model: nn.Module, *, bound: float = DEFAULT_BOUND, device: torch.device | None = None
    ) -> None:
        if not 0 <= bound <= 1:
            raise ValueError(f"bound = {bound}: a share of elements, from 0 to 1")
        self.bound = bound
        self.statistics: dict[str, OperandStatistics] = {}
        self.device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
        self._names: list[str] | None = None
        self._delayed = False  # whether the step under way casts with the last one's maxima
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
        def operand(wanted: bool, key: str) -> OperandStatistics | None:
            if not wanted:
                return None
            if key not in self.statistics:
                self.statistics[key] = OperandStatistics.on(self.device)
            return self.statistics[key]

        linear.statistics = LayerStatistics(
            operand(_before(linear.recipe.output.a), f"{reads_with}.input"),
            operand(_before(linear.recipe.grad_input.a), f"{name}.grad_output"),
        )

    @torch.no_grad()
    def end_step(self) -> SaturationReport:
        """Make this step's maxima the next step's scales. Every rank calls it, whatever layers it holds."""
        names, seen, counts = self._measured()
        shares = {name: s / n for name, (s, n) in zip(names, counts, strict=True) if n}
        worst = max(shares, key=lambda name: shares[name], default="")
        falls_back = bool(shares) and shares[worst] > self.bound
        for name, amax in zip(names, seen, strict=True):
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
        for name, operand in self.statistics.items():
            amax = self._amax.get(name)
            if amax is not None:
                operand.previous_amax.fill_(amax)
            operand.valid = self._delayed and amax is not None
            operand.current_amax.zero_()
            operand.counts.zero_()

    def _measured(self) -> tuple[list[str], list[float], list[list[int]]]:
        """Names, maxima and counts of the operands on all ranks."""
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._names is None:
            theirs: list[list[str]] = [list(self.statistics)]
            if not alone:
                theirs = [[] for _ in range(dist.get_world_size())]
                dist.all_gather_object(theirs, list(self.statistics))
            self._names = sorted({name for names in theirs for name in names})
        if not self._names:
            return [], [], []
        nothing = OperandStatistics.on(self.device)
        here = [self.statistics.get(name, nothing) for name in self._names]
        maxima = torch.cat([o.current_amax for o in here]).flatten()
        counts = torch.stack([o.counts for o in here])
        if not alone:
            assert dist.group.WORLD is not None
            maxima = all_reduce_amax(maxima, [dist.group.WORLD.group_name])
            dist.all_reduce(counts)
        return self._names, maxima.tolist(), counts.tolist()

    def state_dict(self) -> dict[str, Any]:
        """What the next step's scales are, as JSON can hold it; the same on every rank."""
        return {"just_in_time": not self._delayed, "amax": dict(self._amax)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s. Operands it does not name are cast just in time at first."""
        self._amax = {name: float(amax) for name, amax in state["amax"].items()}
        self._begin(just_in_time=state["just_in_time"])
