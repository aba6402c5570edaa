"""Draws the charts of a report from its figures."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.commands.compare.report import svg
from octavo.commands.compare.report.svg import GREY, INK, PALETTE, RED, Bar, Line

Run = Mapping[str, Any]


def run_colours(runs: Sequence[Run]) -> dict[str, str]:
    """Run -> colour: the baseline in the text's colour, its other seeds grey, the control red."""
    colours, free = {}, list(PALETTE)
    for run in runs:
        if run["kind"] == "recipe":
            colours[run["name"]] = free.pop(0) if free else GREY
        else:
            colours[run["name"]] = {"baseline": INK, "seed": GREY, "control": RED}[run["kind"]]
    return colours


def draw_charts(figures: Mapping[str, Any]) -> dict[str, str]:
    """name -> SVG: losses, gaps, gaps enlarged, bars, and heatmaps if health was measured."""
    runs = figures["runs"]
    colours = run_colours(runs)
    return {
        "losses": _losses(runs, colours),
        "gaps": _gaps(figures, colours),
        "gaps_close": _gaps_close(figures, colours),
        **_bars(runs, colours),
        **{name: _heatmap(name, shown) for name, shown in heatmap_data(runs).items()},
    }


def _style(run: Run) -> dict[str, Any]:
    styles: dict[str, dict[str, Any]] = {
        "baseline": {"width": 2.4},
        "seed": {"width": 1.0},
        "control": {"dash": "6 4"},
    }
    return styles.get(run["kind"], {})


def _losses(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    ordered = sorted(runs, key=lambda run: run["kind"] != "seed")  # the seeds lie below the others
    lines = [
        Line(
            run["name"],
            run["smoothed"],
            colours[run["name"]],
            faint=run["losses"] if run["kind"] in ("baseline", "recipe") else (),
            **_style(run),
        )
        for run in ordered
    ]
    values = [value for run in runs for _, value in run["smoothed"] if value is not None] or [0.0, 1.0]
    room = 0.04 * (max(values) - min(values)) or 0.1
    return svg.line_chart(
        lines,
        label="loss, nats per token",
        title="losses over the steps, smoothed",
        y_range=(min(values) - room, max(values) + room),
        name="losses",
    )


def _gaps(figures: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """The y range includes the band and the recipes; the control may leave it."""
    runs = [run for run in figures["runs"] if run["gaps"]]
    values = [abs(value) for run in runs if run["kind"] != "control" for _, value in run["gaps"] if value]
    high = 1.15 * max([*values, *(width for _, width in figures["band"])], default=0.1)
    lines = [Line(run["name"], run["gaps"], colours[run["name"]], **_style(run)) for run in runs]
    title = f"gaps to the loss of {figures['baseline']}, smoothed, and its noise band"
    return _gap_panel(figures, lines, high, title, name="gaps")


def _gaps_close(figures: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """The recipes that started from the baseline's weights, enlarged; faint: differences at every step."""
    runs = [run for run in figures["runs"] if run["kind"] == "recipe" and run["same_weights"]]
    values = sorted(abs(value) for run in runs for _, value in run["gaps"] if value is not None)
    # A run with a very large gap would flatten the others; the chart above shows it.
    high = 1.3 * (min(values[-1], 4 * values[len(values) // 2]) if values else 0.0) or 0.01
    lines = [Line(run["name"], run["gaps"], colours[run["name"]], faint=run["differences"]) for run in runs]
    title = f"gaps of the recipes to the loss of {figures['baseline']}, enlarged, and at every step"
    return _gap_panel(figures, lines, high, title, name="gaps_close")


def _gap_panel(
    figures: Mapping[str, Any], lines: Sequence[Line], high: float, title: str, *, name: str
) -> str:
    """Gaps between -`high` and `high`, over the band."""
    return svg.line_chart(
        lines,
        label=f"loss - loss of {figures['baseline']}, nats",
        title=title,
        y_range=(-high, high),
        band=figures["band"],
        zero=True,
        name=name,
    )


def _bars(runs: Sequence[Run], colours: Mapping[str, str]) -> dict[str, str]:
    shown = [run for run in runs if run["kind"] in ("baseline", "recipe")]

    def chart(name: str, title: str, value: Callable[[Run], Any], text: Callable[[Run, Any], str]) -> str:
        bars = []
        for run in shown:
            length = value(run)
            label = "not reached" if length is None else text(run, length)
            bars.append(Bar(run["name"], length, label, colours[run["name"]]))
        return svg.bar_chart(bars, title=title, name=name)

    def with_ratio(text: str, ratio: float | None) -> str:
        return f"{text} ({ratio:.2f}x)" if ratio else text

    charts = {
        "tps": chart(
            "tps",
            "tokens per second and device, median",
            lambda run: run["median_tps"],
            lambda run, v: with_ratio(f"{v:,.0f}", run["tps_ratio"]),
        ),
        "memory": chart(
            "memory", "peak memory, GiB", lambda run: run["peak_memory_gib"], lambda run, v: f"{v:.2f}"
        ),
        "tokens_to_loss": chart(
            "tokens_to_loss",
            "tokens to the target loss",
            lambda run: run["target"] and run["target"]["tokens"],
            lambda run, v: f"{v:,}",
        ),
        "seconds_to_loss": chart(
            "seconds_to_loss",
            "seconds to the target loss",
            lambda run: run["target"] and run["target"]["seconds"],
            lambda run, v: with_ratio(f"{v:,.1f}", run["speedup_to_target"]),
        ),
    }
    if any(run["saved_bytes"] for run in shown):
        charts["saved"] = chart(
            "saved",
            "activation memory in eager mode, MiB",
            lambda run: run["saved_bytes"],
            lambda run, v: f"{v / 2**20:,.1f}",
        )
    return charts


def heatmap_data(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """name -> the content of a heatmap: title, unit, layers, steps, and a value per layer and step."""
    heatmaps: dict[str, dict[str, Any]] = {}
    for run in runs:
        for operand, grid in (run["health"] or {}).items():
            name = re.sub(r"\W", "_", f"health_{run['name']}_{operand}")  # also a file name
            while name in heatmaps or f"{name}_sqnr" in heatmaps:  # of runs a-b and a_b
                name += "_"
            subject = f"{run['name']}, {operand}"
            for key, title, unit, factor, measure in (
                (name, f"{subject}: flushed to zero", "%", 100, "flushed"),
                (f"{name}_sqnr", f"{subject}: signal to quantisation noise", "dB", 1, "sqnr"),
            ):
                values = [[_rounded(value, factor) for value in row] for row in grid[measure]]
                if any(value is not None for row in values for value in row):
                    axes = {"layers": grid["layers"], "steps": grid["steps"]}
                    heatmaps[key] = {"title": title, "unit": unit, "values": values, **axes}
    return heatmaps


def _rounded(value: float | None, factor: float) -> float | None:
    return None if value is None else float(f"{factor * value:.3g}")


def _heatmap(name: str, heatmap: Mapping[str, Any]) -> str:
    if heatmap["unit"] == "dB":
        scale: dict[str, Any] = {"low": 15.0, "high": 35.0, "bad_is_low": True}
    else:
        largest = max(value for row in heatmap["values"] for value in row if value is not None)
        scale = {"low": 0.0, "high": max(1.0, largest)}
    return svg.heatmap(**heatmap, **scale, name=name)
