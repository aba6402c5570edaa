"""Charts as SVG text: lines over steps, horizontal bars, and a heatmap. No library, no address, no script.

A chart stands in a page or in a file of its own. Colours of lines are fixed, told apart by colour-blind
readers (Okabe and Ito's palette); everything else is `currentColor`, so that a page's dark mode reaches it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH, HEIGHT = 920, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 40
_TICKS = 6
_KEYS, _KEY_ROW = 4, 18  # names of curves side by side below a chart, and the height of a row of them

INK = "currentColor"
GREY = "#9a9a9a"
RED = "#d55e00"
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b3a100", "#7a5195")

_LEVELS = 24  # shades of a heatmap

Points = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Line:
    """One curve. points: [step, value], a value of None is a hole. faint: the same curve unsmoothed."""

    name: str
    points: Points
    colour: str
    width: float = 1.8
    dash: str = ""
    faint: Points = ()


@dataclass(frozen=True)
class Frame:
    """Where values lie on the paper."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def ticks(low: float, high: float, wanted: int = _TICKS) -> list[float]:
    """Round numbers within [low, high], about `wanted`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    title: str,
    y_range: tuple[float, float],
    band: Points = (),
    zero: bool = False,
    name: str = "",
) -> str:
    """Curves over steps, with their names below. label: of the y axis. title: what the chart shows, for
    those who hear it. band: [step, half-width], drawn around zero. What lies outside `y_range` is cut off.
    name: the element's id, by which a page's script finds it.
    """
    every = [
        step for points in (*(line.points for line in lines), band) for step, _ in points if step is not None
    ]
    frame = Frame(min(every, default=0.0), max(every, default=1.0), *y_range)
    clip = f"clip-{name or 'chart'}"
    parts = [
        f'<clipPath id="{clip}"><rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" '
        f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
        _axes(frame, label),
        f'<g clip-path="url(#{clip})">',
    ]
    if band:
        upper = [(frame.x(s), frame.y(w)) for s, w in band if s is not None and w is not None]
        lower = [(frame.x(s), frame.y(-w)) for s, w in band if s is not None and w is not None]
        parts.append(
            f'<path class="band" d="{_path([*upper, *reversed(lower)])}Z" fill="{GREY}" opacity=".3"/>'
        )
    if zero:
        y = f"{frame.y(0):.1f}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="{INK}" opacity=".5"/>'
        )
    for line in lines:
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        drawn = "".join(
            f'<path d="{d}" fill="none" stroke="{line.colour}" stroke-width="{width}" '
            f'opacity="{opacity}"{dash}/>'
            for points, width, opacity in ((line.faint, 0.7, 0.25), (line.points, line.width, 1))
            if (d := _curve(frame, points))
        )
        parts.append(f'<g class="line" data-run="{escape(line.name)}">{drawn}</g>')
    parts.append("</g>")
    keys = [*lines, *([Line("noise band", (), GREY, width=10)] if band else [])]
    parts += [_key(line, number) for number, line in enumerate(keys)]
    data = f' data-frame="{frame.x_low} {frame.x_high} {_LEFT} {WIDTH - _RIGHT} {_TOP} {HEIGHT - _BOTTOM}"'
    height = HEIGHT + _KEY_ROW * math.ceil(len(keys) / _KEYS)
    return _svg(WIDTH, height, "".join(parts), name, data, title=title)


def _key(line: Line, number: int) -> str:
    """The name of a curve, beside a piece of it."""
    row, column = divmod(number, _KEYS)
    x, y = _LEFT + column * (WIDTH - _LEFT) / _KEYS, HEIGHT + row * _KEY_ROW + 8
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    shown = line.name if len(line.name) <= 28 else f"{line.name[:27]}…"
    return (
        f'<path d="M{x:g} {y:g}h22" stroke="{line.colour}" stroke-width="{line.width}"{dash}/>'
        f'<text x="{x + 28:g}" y="{y + 4:g}">{escape(shown)}</text>'
    )


def _curve(frame: Frame, points: Points) -> str:
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None or step is None:
            pieces.append([])
        else:  # far outside, the number would be long and the clip hides it anyway
            y = min(max(frame.y(value), -HEIGHT), 2 * HEIGHT)
            pieces[-1].append((frame.x(step), y))
    return "".join(_path(piece) for piece in pieces if piece)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _axes(frame: Frame, label: str) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    marks = ticks(frame.y_low, frame.y_high)
    digits = _digits(marks)
    for value in marks:
        y = frame.y(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{INK}" opacity=".12"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>'
        )
    for value in ticks(frame.x_low, frame.x_high, 10):
        if value == round(value):
            parts.append(
                f'<text x="{frame.x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:.0f}</text>'
            )
    parts.append(
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="{INK}" opacity=".6"/>'
        f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
        f'<text transform="rotate(-90)" x="{-(_TOP + bottom) / 2}" y="13" '
        f'text-anchor="middle">{escape(label)}</text>'
    )
    return "".join(parts)


def _digits(marks: Sequence[float]) -> int:
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    return max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0


@dataclass(frozen=True)
class Bar:
    """One bar: value None is shown as its text alone."""

    name: str
    value: float | None
    text: str
    colour: str


def bar_chart(bars: Sequence[Bar], *, title: str, name: str = "") -> str:
    """Horizontal bars from zero, one below the other."""
    row, left, right, top = 24, 170, 150, 26
    high = max((bar.value for bar in bars if bar.value is not None), default=1.0) or 1.0
    width = WIDTH // 2 + 60
    parts = [f'<text x="4" y="16" font-weight="600">{escape(title)}</text>']
    for i, bar in enumerate(bars):
        y = top + i * row
        length = 0.0 if bar.value is None else bar.value / high * (width - left - right)
        parts.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>'
            f'<rect class="bar" x="{left}" y="{y + 3}" width="{length:.1f}" height="{row - 7}" '
            f'fill="{bar.colour}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 15}">{escape(bar.text)}</text>'
        )
    return _svg(width, top + len(bars) * row + 6, "".join(parts), name, title=title)


def heatmap(
    *,
    layers: Sequence[str],
    steps: Sequence[int],
    values: Sequence[Sequence[float | None]],
    title: str,
    low: float,
    high: float,
    unit: str,
    bad_is_low: bool = False,
    name: str = "",
) -> str:
    """Layers downwards, steps to the right; the darker, the worse. `low` and `high` end the scale; holes stay
    white.
    """
    row, left, top = 13, 220, 26
    cell = max(2, (WIDTH - left - _RIGHT) // max(1, len(steps)))
    parts = [f'<text x="4" y="16" font-weight="600">{escape(title)}</text>']
    for i, layer in enumerate(layers):
        y = top + i * row + 10
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end" font-size="10">{escape(layer)}</text>')
    strokes: dict[int, list[str]] = {}  # by shade: a few long paths are far shorter than a box a cell
    for i, line in enumerate(values):
        shades = [None if value is None else _level(value, low, high, bad_is_low) for value in line]
        for shade, j, run in _stretches(shades):
            if shade is not None:
                path = f"M{left + j * cell} {top + i * row + row / 2:g}h{run * cell}"
                strokes.setdefault(shade, []).append(path)
    parts += [
        f'<path class="cells" fill="none" stroke="{_shade(level / _LEVELS)}" stroke-width="{row}" '
        f'd="{"".join(pieces)}"/>'
        for level, pieces in sorted(strokes.items())
    ]
    bottom = top + len(layers) * row
    for j in sorted({0, len(steps) // 2, len(steps) - 1}):
        if 0 <= j < len(steps):
            x = left + (j + 0.5) * cell
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{steps[j]}</text>')
    worst, best = (low, high) if bad_is_low else (high, low)
    parts.append(
        f'<text x="4" y="{bottom + 14}" font-size="11">light {best:g} {unit}, dark {worst:g} {unit}</text>'
    )
    parts.append(f'<text class="reading" x="{WIDTH - _RIGHT}" y="16" text-anchor="end"/>')
    frame = f' data-grid="{left} {top} {cell} {row}"'
    return _svg(WIDTH, bottom + 22, "".join(parts), name, frame, title=title)


def _level(value: float, low: float, high: float, bad_is_low: bool) -> int:
    """0 for the best to `_LEVELS` for the worst."""
    share = min(max((value - low) / ((high - low) or 1), 0), 1)
    return round(_LEVELS * (1 - share if bad_is_low else share))


def _stretches(values: Sequence[int | None]) -> Iterator[tuple[int | None, int, int]]:
    """Each stretch of equal values: the value, where it begins, how long it is."""
    start = 0
    for value, equal in groupby(values):
        length = len(list(equal))
        yield value, start, length
        start += length


def _shade(share: float) -> str:
    """From a light yellow through orange to a dark red."""
    stops = ((255, 247, 214), (240, 150, 60), (110, 10, 30))
    at = share * (len(stops) - 1)
    i = min(int(at), len(stops) - 2)
    mixed = (round(a + (b - a) * (at - i)) for a, b in zip(stops[i], stops[i + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _svg(width: int, height: int, inner: str, name: str, data: str = "", *, title: str) -> str:
    named = f' id="{name}"' if name else ""
    return (
        f'<svg{named} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}"{data}>{inner}</svg>'
    )


def standalone_svg(svg: str) -> str:
    """A chart as a file of its own, on white."""
    return svg.replace(
        "<svg", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff;color:#1a1a1a"', 1
    )
