"""Arranges the rows of a run's `health.jsonl` as a grid of layers and steps per operand.

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
"""Measure -> the function that returns the worse of two values."""


def health_grids(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """operand -> layers, steps, and for each of `MEASURES` a value per layer and step (None: not measured);
    None without rows. Layers are in the model's order. If a recipe casts an operand twice, along its rows and
    along its columns, the value is the worse of the two.
    """
    grids: dict[str, Any] = {}
    for operand in dict.fromkeys(str(row.get("operand")) for row in rows):
        own = [row for row in rows if row.get("operand") == operand and {"step", "layer"} <= row.keys()]
        layers = list(dict.fromkeys(str(row["layer"]) for row in own))
        steps = sorted({int(row["step"]) for row in own})
        grid: dict[str, Any] = {"layers": layers, "steps": steps}
        for measure, worse in MEASURES.items():
            values: dict[tuple[str, int], float] = {}
            for row in own:
                value, cell = row.get(measure), (str(row["layer"]), int(row["step"]))
                if isinstance(value, int | float) and math.isfinite(value):
                    values[cell] = worse(values.get(cell, float(value)), float(value))
            grid[measure] = [[values.get((layer, step)) for step in steps] for layer in layers]
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
    """Return the first cell with the worst (max or min) value of `measure`; None if it was not measured."""
    cells = [
        Worst(value, layer, step)
        for layer, row in zip(grid["layers"], grid[measure], strict=True)
        for step, value in zip(grid["steps"], row, strict=True)
        if value is not None
    ]
    extreme = worst([cell.value for cell in cells]) if cells else None
    return next((cell for cell in cells if cell.value == extreme), None)
