"""A plot of a report as SVG: a bar a side, the middle half of its rounds as a whisker, its prediction as a
tick.

Written by hand because it is one kind of plot: a plotting library would be a dependency larger than the
project, for forty lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, LABELS, ROW, GAP, TOP = 900, 300, 18, 34, 56
COLORS = ("#8a8f98", "#3b6fb6", "#d9822b", "#3f9b5f", "#9457b8", "#c4423f", "#5aa7b5", "#a58a2c")


def bars(title: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The document. Times in ms, every comparison on a scale of its own."""
    body: list[str] = []
    y = TOP
    names = list(dict.fromkeys(name for c in comparisons for name in c["sides"]))
    for comparison in comparisons:
        body.append(_text(8, y + 10, comparison["title"], size=13, bold=True))
        y += 20
        longest = max([_longest(side) for side in comparison["sides"].values()] + [1e-12])
        scale = (WIDTH - LABELS - 110) / longest
        for name, side in comparison["sides"].items():
            color = COLORS[names.index(name) % len(COLORS)]
            body += _bar(y, name, side, scale, color)
            y += ROW
        y += GAP - ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" '
            'font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{y + 10}" fill="white"/>',
            _text(8, 20, title, size=14, bold=True),
            _text(8, 38, "ms, median; line: middle half of the rounds; black tick: predicted", size=11),
            *body,
            "</svg>",
            "",
        ]
    )


def _longest(side: Mapping[str, Any]) -> float:
    measured = side["ms"]["q3"] if "ms" in side else 0.0
    return max(measured, side.get("predicted_ms") or 0.0)


def _bar(y: int, name: str, side: Mapping[str, Any], scale: float, color: str) -> list[str]:
    shapes = [_text(LABELS - 8, y + 12, name, anchor="end")]
    predicted = side.get("predicted_ms")
    ms = side.get("ms")
    value = ms["median"] if ms else predicted
    if value is None:
        return [*shapes, _text(LABELS, y + 12, "n/a")]
    fill = color if ms else "none"
    shapes.append(
        f'<rect x="{LABELS}" y="{y + 2}" width="{value * scale:.1f}" height="{ROW - 5}" fill="{fill}" '
        f'stroke="{color}"/>'
    )
    end = value
    if ms:
        end = max(end, ms["q3"])
        low, high = (LABELS + ms[q] * scale for q in ("q1", "q3"))
        middle = y + 2 + (ROW - 5) / 2
        shapes.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222" stroke-width="1.5"/>')
        if predicted is not None:
            end = max(end, predicted)
            at = LABELS + predicted * scale
            shapes.append(f'<path d="M{at:.1f} {y}V{y + ROW - 1}" stroke="black" stroke-width="2"/>')
    speedup = side["speedup"]["median"] if ms else side.get("predicted_speedup")
    told = f"{value:.4g}" + (f"  ({speedup:.2f}x)" if speedup is not None else "")
    return [*shapes, _text(LABELS + end * scale + 6, y + 12, told)]


def _text(x: float, y: float, text: str, *, size: int = 11, bold: bool = False, anchor: str = "start") -> str:
    look = f'font-size="{size}" text-anchor="{anchor}"' + (' font-weight="bold"' if bold else "")
    return f'<text x="{x:.1f}" y="{y}" {look}>{escape(text)}</text>'
