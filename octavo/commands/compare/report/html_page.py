"""Renders the report as one HTML file without external resources.

The drawings need no script. The script, `page.js`, adds interaction: a click on a name hides its curve, and
the pointer shows the values of a step, from the figures embedded in the page.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from octavo.commands.compare.report import wording
from octavo.commands.compare.report.drawings import heatmap_data, run_colours

_HERE = Path(__file__).parent


def html_page(figures: Mapping[str, Any], drawings: Mapping[str, str]) -> str:
    title = wording.report_title(figures)
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p class='answer'>{escape(sentence)}</p>" for sentence in wording.summary(figures)),
        *(f"<p class='warning'>{escape(warning)}</p>" for warning in figures["warnings"]),
        "<h2>Verdicts</h2>",
        _table(wording.verdict_table(figures)),
        "<h2>Loss</h2>",
        _legend(figures),
        _chart(drawings["losses"]),
        "<p id='reading'></p>",
        f"<h2>Gap to {escape(figures['baseline'])}, with its noise band</h2>",
        _chart(drawings["gaps"]),
        f"<h3>{wording.close_up_heading(figures)}</h3>",
        _chart(drawings["gaps_close"]),
        "<h2>Speed and memory</h2>",
        _table(wording.speed_table(figures)),
        "<div class='bars'>",
        *(
            drawings[n]
            for n in ("tps", "memory", "tokens_to_loss", "seconds_to_loss", "saved")
            if n in drawings
        ),
        "</div>",
    ]
    validation = wording.validation_table(figures)
    if validation is not None:
        body += ["<h2>Validation</h2>", _table(validation)]
    worst = wording.worst_layer_table(figures)
    if worst is not None:
        body += ["<h2>Float8 health: the worst layers</h2>", _table(worst)]
        body += [_chart(drawing) for name, drawing in drawings.items() if name.startswith("health_")]
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
    read = {
        "baseline": figures["baseline"],
        "runs": [{key: run[key] for key in ("name", "smoothed", "gaps")} for run in figures["runs"]],
        "heatmaps": heatmap_data(figures["runs"]),
    }
    data = json.dumps(read, separators=(",", ":")).replace("<", "\\u003c")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>{escape(title)}</title>"
        f"<style>{(_HERE / 'page.css').read_text()}</style></head><body>\n"
        + "\n".join(body)
        + f"\n<script type='application/json' id='figures'>{data}</script>"
        f"\n<script>{(_HERE / 'page.js').read_text()}</script>\n</body></html>\n"
    )


def _chart(drawing: str) -> str:
    """A drawing that scrolls horizontally in a narrow window."""
    return f"<div class='chart'>{drawing}</div>"


def _legend(figures: Mapping[str, Any]) -> str:
    colours = run_colours(figures["runs"])
    names = "".join(
        f"<button data-run='{escape(name)}'><i style='background:{colour}'></i>{escape(name)}</button>"
        for name, colour in colours.items()
    )
    return f"<div class='legend'>{names}</div>"


def _table(table: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    head, rows = table
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if any(head) else ""
    lines = "".join(
        "<tr>" + "".join(f"<td{_class(cell)}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='wide'><table>{top}{lines}</table></div>"


def _class(cell: str) -> str:
    word = cell.partition(":")[0]
    return f" class='{word}'" if word in ("inside", "outside") else ""
