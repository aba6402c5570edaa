"""Float8 health over a run, from the rows of its `health.jsonl`: a grid of layers and steps for each operand.

A row has step, layer, operand, recipe, amax, flushed, saturated, nonfinite and sqnr, as octavo.float8.health
defines them: shares from 0 to 1, the SQNR in decibels.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

MEASURES: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {"flushed": max, "saturated": max, "sqnr": min}
)
"""What is shown, and which of two values is the worse."""


def health_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """operand -> layers, steps, and for each of `MEASURES` a value for each layer and step (None: not
    measured); None without rows. Layers are in the order in which the model has them. Where a recipe casts
    an operand twice, along its rows and along its columns, the value is the worse cast's.
    """
    grids: dict[str, Any] = {}
    for operand in dict.fromkeys(str(row.get("operand")) for row in rows):
        mine = [row for row in rows if row.get("operand") == operand and {"step", "layer"} <= row.keys()]
        layers = list(dict.fromkeys(str(row["layer"]) for row in mine))
        steps = sorted({int(row["step"]) for row in mine})
        grid: dict[str, Any] = {"layers": layers, "steps": steps}
        for measure, worse in MEASURES.items():
            found: dict[tuple[str, int], float] = {}
            for row in mine:
                value, place = _number(row.get(measure)), (str(row["layer"]), int(row["step"]))
                if value is not None:
                    found[place] = worse(found[place], value) if place in found else value
            grid[measure] = [[found.get((layer, step)) for step in steps] for layer in layers]
        grids[operand] = grid
    return grids or None


@dataclass(frozen=True)
class Worst:
    """The worst value of a grid, and where it is."""

    value: float
    layer: str
    step: int


def worst_of(
    grid: Mapping[str, Any], measure: str, worst: Callable[[Iterable[float]], float]
) -> Worst | None:
    """The first place of the worst value of `measure`; worst: max or min. None where nothing was measured."""
    found = [
        Worst(value, layer, step)
        for layer, row in zip(grid["layers"], grid[measure], strict=True)
        for step, value in zip(grid["steps"], row, strict=True)
        if value is not None
    ]
    if not found:
        return None
    extreme = worst(each.value for each in found)
    return next(each for each in found if each.value == extreme)


def _number(value: Any) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
