"""Renders the report as one HTML file without external resources: the pointer shows the values of a step or
cell, and a click on a name in a legend hides the other curves.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from octavo.commands.charts import Chart, figure, page_scripts
from octavo.commands.compare.report import wording

_STYLE = Path(__file__).parent / "page.css"
_BARS = ("tps", "memory", "tokens_to_loss", "seconds_to_loss", "saved")


def html_page(figures: Mapping[str, Any], charts: Mapping[str, Chart]) -> str:
    title = wording.report_title(figures)
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p class='answer'>{escape(sentence)}</p>" for sentence in wording.summary(figures)),
        *(f"<p class='warning'>{escape(warning)}</p>" for warning in figures["warnings"]),
        "<h2>Verdicts</h2>",
        _table(wording.verdict_table(figures)),
        "<h2>Loss</h2>",
        figure("losses", charts["losses"]),
        f"<h2>Gap to {escape(figures['baseline'])}, with its noise band</h2>",
        figure("gaps", charts["gaps"]),
        f"<h3>{wording.close_up_heading(figures)}</h3>",
        figure("gaps_close", charts["gaps_close"]),
        "<h2>Speed and memory</h2>",
        _table(wording.speed_table(figures)),
        "<div class='bars'>",
        *(figure(name, charts[name]) for name in _BARS if name in charts),
        "</div>",
    ]
    validation = wording.validation_table(figures)
    if validation is not None:
        body += ["<h2>Validation</h2>", _table(validation)]
    worst = wording.worst_layer_table(figures)
    if worst is not None:
        body += ["<h2>Float8 health: the worst layers</h2>", _table(worst)]
        for name, chart in charts.items():
            if name.startswith("health_"):
                body.append(
                    f"<details><summary>{escape(chart.title)}</summary>{figure(name, chart)}</details>"
                )
    body += [
        "<h2>How to read this</h2>",
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in wording.reading_notes(figures)) + "</ul>",
        "<h2>Where it ran</h2>",
        _table((("", ""), list(wording.environment_rows(figures)))),
        "<h2>Commands</h2>",
        f"<pre>{escape(figures['command'])}</pre>",
    ]
    commands = [run["command"] for run in figures["runs"] if run["command"]]
    listed = escape("\n".join(commands))
    if commands:
        body.append(f"<details><summary>Command of each run</summary><pre>{listed}</pre></details>")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>{escape(title)}</title>"
        f"<style>{_STYLE.read_text()}</style></head><body>\n"
        + "\n".join(body)
        + f"\n{page_scripts()}</body></html>\n"
    )


def _table(table: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    head, rows = table
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if any(head) else ""
    lines = "".join(
        "<tr>" + "".join(_cell(name, cell) for name, cell in zip(head, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<div class='wide'><table>{top}{lines}</table></div>"


def _cell(column: str, text: str) -> str:
    """A cell that knows its column's name, which a narrow page shows beside it."""
    word = text.partition(":")[0]
    verdict = f" class='{word}'" if word in ("inside", "outside") else ""
    return f"<td data-column='{escape(column)}'{verdict}>{escape(text)}</td>"
