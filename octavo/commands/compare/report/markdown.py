"""Renders the report as Markdown, which links the charts as SVG files in the same folder."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from octavo.commands.charts import Chart
from octavo.commands.compare.report import wording


def markdown_page(figures: Mapping[str, Any], charts: Mapping[str, Chart]) -> str:
    parts = [f"# {_plain(wording.report_title(figures))}", *map(_plain, wording.summary(figures))]
    parts += [f"> **Note.** {_plain(warning)}" for warning in figures["warnings"]]
    parts += ["## Verdicts", _table(wording.verdict_table(figures))]
    parts += [
        _image(charts, "losses", "Losses"),
        _image(charts, "gaps", "Gaps to the baseline and its noise band"),
        wording.close_up_heading(figures),
        _image(charts, "gaps_close", "Gaps of the recipes to the baseline, enlarged"),
    ]
    parts += ["## Speed and memory", _table(wording.speed_table(figures))]
    validation = wording.validation_table(figures)
    if validation is not None:
        parts += ["## Validation", _table(validation)]
    health = [name for name in charts if name.startswith("health_")]
    worst = wording.worst_layer_table(figures)
    if worst is not None:
        parts += ["## Float8 health: the worst layers", _table(worst)]
        for name in health:
            summary = f"<summary>{_plain(charts[name].title)}</summary>"
            parts += [f"<details markdown>{summary}", _image(charts, name, name), "</details>"]
    parts += ["## How to read this", *(f"- {_plain(note)}" for note in wording.reading_notes(figures))]
    parts += ["## Where it ran", _table((("", ""), list(wording.environment_rows(figures))))]
    parts += ["## Commands", f"```bash\n{figures['command']}\n```"]
    commands = [run["command"] for run in figures["runs"] if run["command"]]
    if commands:
        parts += ["Command of each run:", "```bash\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _image(charts: Mapping[str, Chart], name: str, text: str) -> str:
    return f"![{text}]({name}.svg)" if name in charts else ""


def _plain(text: str) -> str:
    """Escape `text` for one line of Markdown; a run's name is a folder's, which may contain anything."""
    return escape(text.replace("\n", " "), quote=False)


def _table(table: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
