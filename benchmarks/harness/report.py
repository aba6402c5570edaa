"""A benchmark's results on the terminal, and as three files: JSON with everything, the table, a plot."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import Conditions, describe
from benchmarks.harness.options import Options

FORMAT = 1
"""Of the JSON; raised when a reader of old files would misread a new one."""


@dataclass
class Report:
    """What a run of a benchmark says, gathered comparison by comparison and printed as it comes.

    columns: facts of a side that the table shows -> how: `{"tflops": "{:.0f}"}`.
    """

    name: str
    options: Options
    settings: Mapping[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    written: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def say(self, line: str = "") -> None:
        """Print, and keep for the table's file."""
        self.lines.append(line)
        print(line, flush=True)

    def begin(self) -> None:
        """Say what it runs on."""
        machine = self._machine
        if self.options.predict is not None:
            self.say(f"{self.name}: predictions for {self.options.predict}; nothing is measured")
        else:
            packages = ", ".join(
                f"{name} {machine[name]}" for name in ("torch", "triton", "torchao") if machine[name]
            )
            self.say(f"{self.name} on {machine['device']}: {packages}; commit {machine['commit']}")
        self.say(", ".join(f"{name} {value}" for name, value in self.settings.items()))

    def add(self, comparison: dict[str, Any]) -> None:
        """One comparison, in a table of its own. The files are written each time: a run may be stopped."""
        self.comparisons.append(comparison)
        facts = ", ".join(f"{name} {_short(value)}" for name, value in comparison["facts"].items())
        self.say()
        self.say(f"{comparison['title']}{f'  ({facts})' if facts else ''}")
        for line in table(comparison, self.columns):
            self.say(line)
        if self.options.out is not None:
            self._write(self._whole(None, complete=False), self.options.out)

    def finish(self, conditions: Conditions | None = None) -> dict[str, Any]:
        """Close the report: what was left out, the state of the GPU, the files. Returns the whole JSON."""
        measured = None if conditions is None else conditions.summary()
        budget = self.options.budget
        self.say()
        for name, value in self.summary.items():
            self.say(f"{name}: {_short(value)}")
        if budget.left_out:
            self.say(f"left out, for want of time ({budget.minutes:g} minutes): {', '.join(budget.left_out)}")
        if self.options.predict is None:
            self.say(_conditions_line(measured))
            self.say(f"{budget.seconds:.0f} s")
        whole = self._whole(measured, complete=True)
        if self.options.out is not None:
            paths = self._write(whole, self.options.out)
            print("written: " + ", ".join(map(str, paths)))
        return whole

    def _whole(self, measured: Mapping[str, Any] | None, *, complete: bool) -> dict[str, Any]:
        budget = self.options.budget
        return {
            "format": FORMAT,
            "benchmark": self.name,
            "written": self.written,
            "complete": complete,
            "smoke": self.options.smoke,
            "predict": self.options.predict,
            "machine": self._machine,
            "conditions": measured,
            "settings": dict(self.settings),
            "rounds": self.options.rounds,
            "seconds": budget.seconds,
            "minutes_allowed": budget.minutes,
            "left_out": budget.left_out,
            "comparisons": self.comparisons,
            "summary": self.summary,
        }

    @cached_property
    def _machine(self) -> dict[str, Any]:
        return describe(self.options.device)

    def _write(self, whole: Mapping[str, Any], folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / file_stem(whole)
        files = {
            ".json": json.dumps(whole, indent=1) + "\n",
            ".txt": "\n".join(self.lines) + "\n",
        }
        with suppress(ModuleNotFoundError):  # a GPU machine may lack Altair
            files[".svg"] = plot(self.lines[0], self.comparisons)
        for suffix, text in files.items():
            stem.with_name(stem.name + suffix).write_text(text)
        return [stem.with_name(stem.name + suffix) for suffix in files]


def file_stem(whole: Mapping[str, Any]) -> str:
    """benchmark-device-torch-date: `gemm-nvidia-h100-80gb-hbm3-torch2.13.0-20261123T194500`."""
    machine = whole["machine"]
    device = whole["predict"] or machine["device"]
    kind = "-smoke" if whole["smoke"] else "-predicted" if whole["predict"] else ""
    moment = re.sub(r"[-:]|\+.*", "", whole["written"])
    torch = str(machine["torch"]).partition("+")[0]
    return f"{whole['benchmark']}{kind}-{_slug(device)}-torch{torch}-{moment}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plot(title: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    """An SVG file: a bar per side, the middle half of its rounds as a line, its prediction as a tick; every
    comparison on a scale of its own.
    """
    import altair as alt

    from octavo.commands.charts import INK, chart_of, to_svg

    panels = []
    for comparison in comparisons:
        rows = []
        for name, side in comparison["sides"].items():
            ms, predicted = side.get("ms") or {}, side.get("predicted_ms")
            value = ms.get("median", predicted)
            speedup = side["speedup"]["median"] if ms else side.get("predicted_speedup")
            text = "n/a" if value is None else f"{value:.4g}" + (f"  ({speedup:.2f}x)" if speedup else "")
            end = max((part for part in (value, ms.get("q3"), predicted) if part is not None), default=0.0)
            row = {"side": name, "value": value, "predicted": predicted, "text": text, "end": end}
            rows.append({**row, "q1": ms.get("q1"), "q3": ms.get("q3"), "fill": 0.8 if ms else 0.2})
        longest = max(row["end"] for row in rows) or 1.0
        bars = chart_of(rows).encode(
            alt.X("value:Q", axis=None).scale(domain=[0, 1.3 * longest], nice=False),  # room for the texts
            alt.Y("side:N", sort=None, title=None).axis(ticks=False, domain=False),
        )
        panel = alt.layer(
            bars.mark_bar().encode(
                alt.Color("side:N", legend=None), alt.FillOpacity("fill:Q", scale=None, legend=None)
            ),
            bars.mark_rule(color=INK, strokeWidth=1.5).encode(x="q1:Q", x2="q3:Q"),
            bars.mark_tick(color=INK, thickness=2).encode(x="predicted:Q"),
            bars.mark_text(align="left", dx=6).encode(x="end:Q", text="text:N"),
        )
        panels.append(panel.properties(title=comparison["title"], height=alt.Step(18)))
    words = "ms, median; line: middle half of the rounds; tick: predicted"
    return to_svg(alt.vconcat(*panels, title=alt.Title(title, subtitle=words)).resolve_scale(x="independent"))


def table(comparison: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """One comparison as aligned lines of text."""
    predicted_only = "control" not in comparison
    head = ["", "predicted ms", "speedup"]
    if not predicted_only:
        head = ["", "ms", "quartiles", "speedup", "quartiles", "", "predicted ms", "measured/predicted"]
        head += list(columns)
    rows = [head]
    for name, side in comparison["sides"].items():
        if predicted_only:
            rows.append([name, _number(side["predicted_ms"]), _number(side["predicted_speedup"], ".2f")])
            continue
        ms, speedup = side["ms"], side["speedup"]
        noise = "" if name == comparison["reference"] else "" if side["beyond_noise"] else "within noise"
        row = [name, _number(ms["median"]), _range(ms, ".3g"), f"{speedup['median']:.3f}"]
        row += [_range(speedup, ".3f"), noise, _number(side["predicted_ms"])]
        row += [_number(side["measured_over_predicted"], ".2f")]
        row += ["n/a" if side.get(c) is None else form.format(side[c]) for c, form in columns.items()]
        rows.append(row)
    lines = _align(rows)
    if not predicted_only:
        control = comparison["control"]
        lines.append(
            f"  control: {comparison['controlled']} against itself {control['median']:.3f}, "
            f"from {control['least']:.3f} to {control['most']:.3f}, {control['n']} rounds"
        )
    return lines


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in _zip(row, widths))
        for row in rows
    ]


def _zip(row: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(row, widths, strict=True)))


def _number(value: float | None, form: str = ".4g") -> str:
    return "n/a" if value is None else f"{value:{form}}"


def _range(spread: Mapping[str, float], form: str) -> str:
    return f"{spread['q1']:{form}}-{spread['q3']:{form}}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _conditions_line(measured: Mapping[str, Mapping[str, float]] | None) -> str:
    if measured is None:
        return "clock, power, temperature: n/a (no nvidia-smi)"
    parts = [f"{name} {s['median']:g} ({s['least']:g} to {s['most']:g})" for name, s in measured.items()]
    return "while it ran: " + ", ".join(parts)
