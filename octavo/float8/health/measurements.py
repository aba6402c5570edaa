"""Health measurements as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Measurement:
    """The numbers of one cast of one layer's operand; `octavo.float8.health` defines them.

    layer: fully qualified name. operand: "input", "weight" or "grad_output". gemms: the products that read
    this cast, of "output", "grad_input" and "grad_weight". values: how many were measured; amax is that of
    all.
    """

    layer: str
    recipe: str
    operand: str
    gemms: tuple[str, ...]
    values: int
    amax: float
    flushed: float
    saturated: float
    nonfinite: float
    sqnr: float


@dataclass(frozen=True)
class Table:
    """A table of measurements; `str` aligns it in columns."""

    rows: tuple[Measurement, ...]

    def worst(self, count: int = 5, by: str = "flushed") -> Table:
        """The `count` rows with the largest loss by "flushed", "saturated", "nonfinite" or "sqnr"; rows with
        NaN or infinite values come first.

        "flushed" shows an outlier: it takes up the range of its block, so that the other values become zero,
        while the outlier itself, which dominates the SQNR, is cast well.
        """
        if by not in ("flushed", "saturated", "nonfinite", "sqnr"):
            raise ValueError(f"by={by!r} must be flushed, saturated, nonfinite or sqnr")
        sign = 1 if by == "sqnr" else -1

        def key(row: Measurement) -> tuple[bool, float]:
            finite = row.nonfinite == 0 and math.isfinite(row.amax)
            return finite, sign * getattr(row, by) if finite else 0.0

        return Table(tuple(sorted(self.rows, key=key)[:count]))

    def __str__(self) -> str:
        lines = [[field.name for field in fields(Measurement)]]
        for row in self.rows:
            texts = [
                row.layer,
                row.recipe,
                row.operand,
                "+".join(row.gemms),
                str(row.values),
                f"{row.amax:.3g}",
            ]
            shares = [f"{share:.3%}" for share in (row.flushed, row.saturated, row.nonfinite)]
            lines.append([*texts, *shares, f"{row.sqnr:.1f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text_columns = 4  # aligned to the left; numbers are aligned to the right
        return "\n".join(
            "  ".join(
                text.ljust(width) if i < text_columns else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
