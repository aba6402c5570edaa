"""Charts of curves, bars and grids, and the two ways to show them: an SVG file, and a page with hover values.

Altair describes a chart; vl-convert draws the file without a browser, and has the scripts that draw a page's
charts without a network. Curves have colours that colour-blind readers tell apart (Okabe and Ito's palette);
all else is `currentColor`, so that light and dark modes reach it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import altair as alt
import vl_convert

Points = Sequence[Sequence[float | None]]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart

INK, GREY, RED = "currentColor", "#9a9a9a", "#d55e00"
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b3a100", "#7a5195")
BAND = "noise band"

_HEAT = ("#fff7d6", "#f0963c", "#6e0a1e")  # from good to bad
_WIDTH = 760  # of a file; in a page a chart is as wide as the page
_VERSION = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])  # of Vega-Lite


@dataclass(frozen=True)
class Curve:
    """One curve: [step, value] pairs; a value of None is a hole. faint: the same curve unsmoothed."""

    name: str
    points: Points
    colour: str
    width: float = 1.8
    dash: tuple[int, int] = (1, 0)
    faint: Points = ()


@dataclass(frozen=True)
class Bar:
    """One bar; a value of None is shown as its text alone."""

    name: str
    value: float | None
    text: str
    colour: str


def chart_of(rows: Iterable[Mapping[str, Any]]) -> alt.Chart:
    """A chart of `rows`, still without marks. A page or file holds the rows; nothing is sampled."""
    return alt.Chart(alt.Data(values=list(rows)))


def line_chart(
    curves: Sequence[Curve],
    *,
    label: str,
    title: str,
    y_range: tuple[float, float],
    band: Points = (),
    zero: bool = False,
) -> Chart:
    """Curves over steps, the first one lowest. label: of the y axis, whose ends are `y_range`. band: [step,
    half-width], drawn around zero.

    Curve number i is column `ci` of the values, and its unsmoothed form `fi`: a name may be any text.
    """
    rows: dict[Any, dict[str, Any]] = {}
    columns = {f"c{i}": curve.points for i, curve in enumerate(curves)}
    columns |= {f"f{i}": curve.faint for i, curve in enumerate(curves)}
    for column, points in {**columns, "band": band}.items():
        for step, value in points:
            rows.setdefault(step, {"step": step})[column] = None if value is None else float(f"{value:.6g}")
    x = alt.X("step:Q", title="step").scale(nice=False).axis(grid=False)
    y = alt.Y("value:Q", title=label).scale(domain=list(y_range))
    names, colours = [curve.name for curve in curves], [curve.colour for curve in curves]
    if band:
        names, colours = [*names, BAND], [*colours, GREY]
    colour = alt.Color("name:N").scale(domain=names, range=colours)
    data = alt.Data(values=[rows[step] for step in sorted(rows)])
    base = alt.Chart().encode(x)

    def named(name: str, column: str) -> alt.Chart:
        return base.transform_calculate(name=json.dumps(name), value=f"datum.{column}").encode(y, colour)

    shown = alt.selection_point(name="shown", fields=["name"], bind="legend")
    at = alt.selection_point(
        name="at", on="pointermove", clear="pointerleave", nearest=True, encodings=["x"], empty=False
    )
    layers = []
    if band:
        around = named(BAND, "band").transform_filter("isValid(datum.band)")
        around = around.transform_calculate(low="-datum.band").encode(alt.Y2("low:Q"))
        layers.append(around.mark_area(clip=True, opacity=0.3))
    if zero:
        layers.append(chart_of([{}]).mark_rule(color=INK, opacity=0.5).encode(y=alt.datum(0)))
    for i, curve in enumerate(curves):
        if curve.faint:
            layers.append(named(curve.name, f"f{i}").mark_line(clip=True, opacity=0.25, strokeWidth=0.7))
    for i, curve in enumerate(curves):
        line = named(curve.name, f"c{i}")
        line = line.mark_line(clip=True, strokeWidth=curve.width, strokeDash=list(curve.dash))
        layers.append(line.encode(opacity=alt.when(shown).then(alt.value(1)).otherwise(alt.value(0.05))))
    values = [alt.Tooltip(f"c{i}:Q", title=curve.name, format=".4f") for i, curve in enumerate(curves)]
    pointed = base.mark_rule(color=INK).encode(
        opacity=alt.when(at).then(alt.value(0.5)).otherwise(alt.value(0)),
        tooltip=[alt.Tooltip("step:Q"), *values],
    )
    chart = alt.layer(*layers, pointed.add_params(at), data=data).add_params(shown)
    return chart.properties(title=title, height=300)


def bar_chart(bars: Sequence[Bar], *, title: str) -> Chart:
    """Horizontal bars from zero, one below the other, each with its text at its end."""
    high = max((bar.value for bar in bars if bar.value is not None), default=0.0) or 1.0
    base = chart_of(
        {"name": bar.name, "value": bar.value, "text": bar.text, "colour": bar.colour} for bar in bars
    ).encode(
        alt.X("length:Q", axis=None).scale(domain=[0, 1.6 * high], nice=False),  # room for the texts
        alt.Y("name:N", sort=None, title=None).axis(ticks=False, domain=False),
        tooltip=[alt.Tooltip("name:N"), alt.Tooltip("text:N", title=title)],
    )
    base = base.transform_calculate(length="datum.value || 0")
    return alt.layer(
        base.mark_bar().encode(alt.Color("colour:N", scale=None)),
        base.mark_text(align="left", dx=5).encode(text="text:N"),
    ).properties(title=title, height=alt.Step(22))


def heatmap(
    values: Sequence[Sequence[float | None]],
    *,
    layers: Sequence[str],
    steps: Sequence[int],
    title: str,
    unit: str,
    good: float,
    bad: float,
) -> Chart:
    """Layers downwards, steps to the right. `good` and `bad` end the scale of colours; holes stay empty."""
    columns: list[Any] = [str(step) for step in steps]
    rows = [
        {"layer": layer, **dict(zip(columns, row, strict=True))}
        for layer, row in zip(layers, values, strict=True)
    ]
    ends, colours = ((good, bad), _HEAT) if good < bad else ((bad, good), _HEAT[::-1])
    return (
        chart_of(rows)
        .transform_fold(columns, as_=["step", "value"])
        .transform_filter("isValid(datum.value)")
        .mark_rect(aria=False)
        .encode(
            alt.X("step:O", sort=columns).axis(labelOverlap="greedy", labelAngle=0),
            alt.Y("layer:N", sort=list(layers), title=None).axis(labelFontSize=9),
            alt.Color("value:Q")
            .scale(domain=list(ends), range=list(colours), clamp=True, interpolate="rgb")
            .legend(title=unit, direction="horizontal", gradientLength=160),
            tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("step:O"), alt.Tooltip("value:Q", title=unit)],
        )
        .properties(title=title, height=alt.Step(13))
    )


def _spec(chart: Chart) -> dict[str, Any]:
    ink = {f"{part}Color": INK for part in ("label", "title", "tick", "domain", "grid")}
    faint = {"gridOpacity": 0.12, "domainOpacity": 0.6, "titleFontWeight": "normal", "labelLimit": 220}
    ends = {"symbolOpacity": 1, "symbolType": "stroke", "symbolStrokeWidth": 2.5}
    styled = (
        chart.configure(background="transparent", font="Arial, Helvetica, sans-serif")
        .configure_view(stroke=None, continuousWidth=_WIDTH, discreteWidth=_WIDTH)
        .configure_title(color=INK, subtitleColor=INK, anchor="start", fontSize=13)
        .configure_text(color=INK)
        .configure_axis(**ink, **faint)
        .configure_legend(**ends, labelColor=INK, titleColor=INK, orient="bottom", title=None, columns=4)
    )
    spec = styled.to_dict()
    del spec["$schema"]  # an address, which nobody asks
    return spec


def to_svg(chart: Chart) -> str:
    """`chart` as a file of its own, readable in light and dark."""
    margin = {"left": 30, "right": 20, "top": 5, "bottom": 5}  # a reader's font may be wider
    spec = {**_spec(chart), "padding": margin}
    if "layer" in spec:  # nobody hovers over a picture
        spec["layer"] = [
            layer for layer in spec["layer"] if "at" not in str(layer["encoding"].get("opacity"))
        ]
    svg = vl_convert.vegalite_to_svg(spec, vl_version=_VERSION)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    light, dark = "svg{color:#1a1a1a;background:#fff}", "svg{color:#e8e8e8;background:#16181b}"
    style = f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"
    return svg.replace(">", f">{style}", 1).replace(' aria-hidden="true"', "") + "\n"


def figure(name: str, chart: Chart) -> str:
    """`chart` in a page, below its title, in an element whose id is `name`."""
    spec = {**_spec(chart), "width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    title = escape(spec.pop("title"))
    data = json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"<figure id='{escape(name)}'><figcaption>{title}</figcaption>"
        f"<div role='img' aria-label='{title}'></div>"
        f"<script type='application/json'>{data}</script></figure>"
    )


def page_scripts() -> str:
    """What a page needs at its end to draw its figures. Those in a closed <details> wait until it opens."""
    library = vl_convert.javascript_bundle(vl_version=_VERSION)  # type: ignore[call-arg]  # its stub lacks a default
    return f"<script>{library}</script>\n<script>{_DRAW}</script>\n"


_DRAW = """
const draw = (figure) => {
  const place = figure.querySelector("div");
  if (place.hasChildNodes()) return;
  const spec = JSON.parse(figure.querySelector("script").textContent);
  spec.config.legend.columns = Math.max(1, Math.floor(place.clientWidth / 180));
  vegaEmbed(place, spec, { actions: false, renderer: "svg", mode: "vega-lite" });
};
for (const figure of document.querySelectorAll("figure")) {
  const fold = figure.closest("details");
  if (fold && !fold.open) fold.addEventListener("toggle", () => draw(figure));
  else draw(figure);
}
"""
