"""The report as Markdown, with its drawings as SVG files beside it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from octavo.commands.compare.report import wording


def markdown_page(figures: Mapping[str, Any], drawings: Mapping[str, str]) -> str:
    """The page; it names the drawings as NAME.svg, in its own folder."""
    parts = [f"# {_plain(wording.title_of(figures))}", *map(_plain, wording.summary_of(figures))]
    parts += [f"> **Note.** {_plain(warning)}" for warning in figures["warnings"]]
    parts += ["## Verdicts", _table(wording.verdicts_of(figures))]
    parts += [
        _image(drawings, "losses", "Losses"),
        _image(drawings, "gaps", "Gaps to the baseline and its noise band"),
        wording.close_by(figures),
        _image(drawings, "gaps_close", "Gaps of the recipes to the baseline, close by"),
    ]
    parts += ["## Speed and memory", _table(wording.speeds_of(figures))]
    validation = wording.validation_of(figures)
    if validation is not None:
        parts += ["## Validation", _table(validation)]
    health = [name for name in drawings if name.startswith("health_")]
    worst = wording.worst_layers_of(figures)
    if worst is not None:
        parts += ["## Float8 health: which layers suffer", _table(worst)]
        parts += [_image(drawings, name, name) for name in health]
    parts += ["## How to read this", *(f"- {_plain(note)}" for note in wording.notes_of(figures))]
    parts += ["## Where it ran", _table((("", ""), list(wording.environment_of(figures))))]
    parts += ["## Commands", f"```bash\n{figures['command']}\n```"]
    commands = [run["command"] for run in figures["runs"] if run["command"]]
    if commands:
        parts += ["Each run by hand:", "```bash\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _image(drawings: Mapping[str, str], name: str, text: str) -> str:
    return f"![{text}]({name}.svg)" if name in drawings else ""


def _plain(text: str) -> str:
    """`text` as a line that Markdown takes as text: a run's name is a folder's, which may be anything."""
    return escape(text.replace("\n", " "), quote=False)


def _table(table: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
