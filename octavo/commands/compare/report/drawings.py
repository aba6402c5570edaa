"""Draws the charts of a report from its figures."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.commands.charts import GREY, INK, PALETTE, RED, Bar, Chart, Curve, bar_chart, heatmap, line_chart

Run = Mapping[str, Any]


def _run_colours(runs: Sequence[Run]) -> dict[str, str]:
    """Run -> colour: the baseline in the text's colour, its other seeds grey, the control red."""
    colours, free = {}, list(PALETTE)
    for run in runs:
        if run["kind"] == "recipe":
            colours[run["name"]] = free.pop(0) if free else GREY
        else:
            colours[run["name"]] = {"baseline": INK, "seed": GREY, "control": RED}[run["kind"]]
    return colours


def draw_charts(figures: Mapping[str, Any]) -> dict[str, Chart]:
    """name -> chart: losses, gaps, gaps enlarged, bars, and heatmaps if health was measured."""
    runs = figures["runs"]
    colours = _run_colours(runs)
    return {
        "losses": _losses(runs, colours),
        "gaps": _gaps(figures, colours),
        "gaps_close": _gaps_close(figures, colours),
        **_bars(runs, colours),
        **_heatmaps(runs),
    }


def _style(run: Run) -> dict[str, Any]:
    styles: dict[str, dict[str, Any]] = {
        "baseline": {"width": 2.4},
        "seed": {"width": 1.0},
        "control": {"dash": (6, 4)},
    }
    return styles.get(run["kind"], {})


def _losses(runs: Sequence[Run], colours: Mapping[str, str]) -> Chart:
    ordered = sorted(runs, key=lambda run: run["kind"] != "seed")  # the seeds lie below the others
    lines = [
        Curve(
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
    return line_chart(
        lines,
        label="loss, nats per token",
        title="losses over the steps, smoothed",
        y_range=(min(values) - room, max(values) + room),
    )


def _gaps(figures: Mapping[str, Any], colours: Mapping[str, str]) -> Chart:
    """The y range includes the band and the recipes; the control may leave it."""
    runs = [run for run in figures["runs"] if run["gaps"]]
    values = [abs(value) for run in runs if run["kind"] != "control" for _, value in run["gaps"] if value]
    high = 1.15 * max([*values, *(width for _, width in figures["band"])], default=0.1)
    lines = [Curve(run["name"], run["gaps"], colours[run["name"]], **_style(run)) for run in runs]
    title = f"gaps to the loss of {figures['baseline']}, smoothed, and its noise band"
    return _gap_panel(figures, lines, high, title)


def _gaps_close(figures: Mapping[str, Any], colours: Mapping[str, str]) -> Chart:
    """The recipes that started from the baseline's weights, enlarged; faint: differences at every step."""
    runs = [run for run in figures["runs"] if run["kind"] == "recipe" and run["same_weights"]]
    values = sorted(abs(value) for run in runs for _, value in run["gaps"] if value is not None)
    # A run with a very large gap would flatten the others; the chart above shows it.
    high = 1.3 * (min(values[-1], 4 * values[len(values) // 2]) if values else 0.0) or 0.01
    lines = [Curve(run["name"], run["gaps"], colours[run["name"]], faint=run["differences"]) for run in runs]
    title = f"gaps of the recipes to the loss of {figures['baseline']}, enlarged, and at every step"
    return _gap_panel(figures, lines, high, title)


def _gap_panel(figures: Mapping[str, Any], lines: Sequence[Curve], high: float, title: str) -> Chart:
    """Gaps between -`high` and `high`, over the band."""
    return line_chart(
        lines,
        label=f"loss - loss of {figures['baseline']}, nats",
        title=title,
        y_range=(-high, high),
        band=figures["band"],
        zero=True,
    )


def _bars(runs: Sequence[Run], colours: Mapping[str, str]) -> dict[str, Chart]:
    shown = [run for run in runs if run["kind"] in ("baseline", "recipe")]

    def chart(title: str, value: Callable[[Run], Any], text: Callable[[Run, Any], str]) -> Chart:
        bars = []
        for run in shown:
            length = value(run)
            label = "not reached" if length is None else text(run, length)
            bars.append(Bar(run["name"], length, label, colours[run["name"]]))
        return bar_chart(bars, title=title)

    def with_ratio(text: str, ratio: float | None) -> str:
        return f"{text} ({ratio:.2f}x)" if ratio else text

    charts = {
        "tps": chart(
            "tokens per second and device, median",
            lambda run: run["median_tps"],
            lambda run, v: with_ratio(f"{v:,.0f}", run["tps_ratio"]),
        ),
        "memory": chart("peak memory, GiB", lambda run: run["peak_memory_gib"], lambda run, v: f"{v:.2f}"),
        "tokens_to_loss": chart(
            "tokens to the target loss",
            lambda run: run["target"] and run["target"]["tokens"],
            lambda run, v: f"{v:,}",
        ),
        "seconds_to_loss": chart(
            "seconds to the target loss",
            lambda run: run["target"] and run["target"]["seconds"],
            lambda run, v: with_ratio(f"{v:,.1f}", run["speedup_to_target"]),
        ),
    }
    if any(run["saved_bytes"] for run in shown):
        charts["saved"] = chart(
            "activation memory in eager mode, MiB",
            lambda run: run["saved_bytes"],
            lambda run, v: f"{v / 2**20:,.1f}",
        )
    return charts


def _heatmaps(runs: Sequence[Run]) -> dict[str, Chart]:
    """Two for each operand that was measured."""
    heatmaps: dict[str, Chart] = {}
    for run in runs:
        for operand, grid in (run["health"] or {}).items():
            name = re.sub(r"\W", "_", f"health_{run['name']}_{operand}")  # also a file name
            while name in heatmaps or f"{name}_sqnr" in heatmaps:  # of runs a-b and a_b
                name += "_"
            subject = f"{run['name']}, {operand}"
            axes = {"layers": grid["layers"], "steps": grid["steps"]}
            if flushed := _scaled(grid["flushed"], 100):
                bad = max(1.0, *(value for row in flushed for value in row if value is not None))
                title = f"{subject}: flushed to zero, %"
                heatmaps[name] = heatmap(flushed, title=title, unit="%", good=0.0, bad=bad, **axes)
            if sqnr := _scaled(grid["sqnr"], 1):
                title = f"{subject}: signal to quantisation noise, dB"
                heatmaps[f"{name}_sqnr"] = heatmap(
                    values=sqnr, title=title, unit="dB", good=35.0, bad=15.0, **axes
                )
    return heatmaps


def _scaled(rows: Sequence[Sequence[float | None]], factor: float) -> list[list[float | None]]:
    """`rows` times `factor`, to three digits; empty if no value was measured."""
    scaled = [[None if value is None else float(f"{factor * value:.3g}") for value in row] for row in rows]
    return scaled if any(value is not None for row in scaled for value in row) else []
