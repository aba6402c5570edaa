"""The charts of a report, drawn from its figures."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.commands.compare.report import svg
from octavo.commands.compare.report.svg import GREY, INK, PALETTE, RED, Bar, Line

Run = Mapping[str, Any]


def colours_of(runs: Sequence[Run]) -> dict[str, str]:
    """A colour for each run: the baseline in ink, its other seeds grey, the control red."""
    colours, free = {}, list(PALETTE)
    for run in runs:
        if run["kind"] == "recipe":
            colours[run["name"]] = free.pop(0) if free else GREY
        else:
            colours[run["name"]] = {"baseline": INK, "seed": GREY, "control": RED}[run["kind"]]
    return colours


def drawings_of(figures: Mapping[str, Any]) -> dict[str, str]:
    """name -> SVG: losses, gaps from afar and close by, the bars, and the heatmaps where health was
    measured.
    """
    runs = figures["runs"]
    colours = colours_of(runs)
    return {
        "losses": _losses(runs, colours),
        "gaps": _gaps(figures, colours),
        "gaps_close": _gaps_close(figures, colours),
        **_bars(runs, colours),
        **{name: _heatmap(name, shown) for name, shown in heatmaps_of(runs).items()},
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
    """The panel shows the band and the recipes whole; a control may leave it."""
    runs = [run for run in figures["runs"] if run["gaps"]]
    values = [abs(value) for run in runs if run["kind"] != "control" for _, value in run["gaps"] if value]
    high = 1.15 * max([*values, *(width for _, width in figures["band"])], default=0.1)
    lines = [Line(run["name"], run["gaps"], colours[run["name"]], **_style(run)) for run in runs]
    title = f"gaps to the loss of {figures['baseline']}, smoothed, and its noise band"
    return _gap_panel(figures, lines, high, title, name="gaps")


def _gaps_close(figures: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """The recipes that started from the baseline's weights alone, on a scale of their own: faint, the
    differences step by step.
    """
    runs = [run for run in figures["runs"] if run["kind"] == "recipe" and run["same_weights"]]
    values = sorted(abs(value) for run in runs for _, value in run["gaps"] if value is not None)
    # A run that goes far astray would flatten the others; it stands in the panel above.
    high = 1.3 * (min(values[-1], 4 * values[len(values) // 2]) if values else 0.0) or 0.01
    lines = [Line(run["name"], run["gaps"], colours[run["name"]], faint=run["differences"]) for run in runs]
    title = f"gaps of the recipes to the loss of {figures['baseline']}, close by, and step by step"
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

    def chart(name: str, title: str, value: Any, text: Any) -> str:
        bars = []
        for run in shown:
            found = value(run)
            told = "not reached" if found is None else text(run, found)
            bars.append(Bar(run["name"], found, told, colours[run["name"]]))
        return svg.bar_chart(bars, title=title, name=name)

    drawn = {
        "tps": chart(
            "tps",
            "tokens per second and device, median",
            lambda run: run["median_tps"],
            lambda run, v: f"{v:,.0f}" + (f" ({run['tps_ratio']:.2f}x)" if run["tps_ratio"] else ""),
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
            lambda run, v: (
                f"{v:,.1f}" + (f" ({run['speedup_to_target']:.2f}x)" if run["speedup_to_target"] else "")
            ),
        ),
    }
    if any(run["saved_bytes"] for run in shown):
        drawn["saved"] = chart(
            "saved",
            "MiB kept for backward, eager",
            lambda run: run["saved_bytes"],
            lambda run, v: f"{v / 2**20:,.1f}",
        )
    return drawn


def heatmaps_of(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """name -> what a heatmap shows: title, unit, layers, steps, and a value for each layer and step."""
    found = {}
    for run in runs:
        for operand, grid in (run["health"] or {}).items():
            name = re.sub(r"\W", "_", f"health_{run['name']}_{operand}")  # of a file, too
            while name in found or f"{name}_sqnr" in found:  # of runs a-b and a_b
                name += "_"
            axes = {"layers": grid["layers"], "steps": grid["steps"]}
            of = f"{run['name']}, {operand}"
            percent = [[None if value is None else 100 * value for value in row] for row in grid["flushed"]]
            if any(value is not None for row in percent for value in row):
                found[name] = {"title": f"{of}: flushed to zero", "unit": "%", "values": percent, **axes}
            if any(value is not None for row in grid["sqnr"] for value in row):
                title = f"{of}: signal to quantisation noise"
                found[f"{name}_sqnr"] = {"title": title, "unit": "dB", "values": grid["sqnr"], **axes}
    for heatmap in found.values():
        heatmap["values"] = [[_rounded(value) for value in row] for row in heatmap["values"]]
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _heatmap(name: str, shown: Mapping[str, Any]) -> str:
    if shown["unit"] == "dB":
        scale: dict[str, Any] = {"low": 15.0, "high": 35.0, "bad_is_low": True}
    else:
        most = max(value for row in shown["values"] for value in row if value is not None)
        scale = {"low": 0.0, "high": max(1.0, most)}
    return svg.heatmap(**shown, **scale, name=name)
