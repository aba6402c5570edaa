"""The report's two pages from one list of parts: HTML in one file without external resources, in which the
pointer shows values and a click on a name in a legend fades the other curves; and Markdown, which links the
charts as SVG files in the same folder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from octavo.commands.charts import Chart, figure, page_scripts
from octavo.commands.compare.report import wording

Part = tuple[str, Any]
"""A kind, one of `_HTML`, and its content."""
Charts = Mapping[str, Chart]

_STYLE = Path(__file__).parent / "page.css"


def report_parts(figures: Mapping[str, Any], charts: Charts) -> Iterator[Part]:
    """The content of both pages, in its order."""
    yield from (("answer", sentence) for sentence in wording.summary(figures))
    yield from (("warning", warning) for warning in figures["warnings"])
    yield "heading", "Verdicts"
    yield "table", wording.verdict_table(figures)
    for heading, name in (
        ("Loss", "losses"),
        (f"Gap to {figures['baseline']}, with its noise band", "gaps"),
        (wording.close_up_heading(figures), "gaps_close"),
    ):
        yield "heading", heading
        yield "charts", {name: charts[name]}
    yield "heading", "Speed and memory"
    yield "table", wording.speed_table(figures)
    bars = ("tps", "memory", "tokens_to_loss", "seconds_to_loss", "saved")
    yield "charts", {name: charts[name] for name in bars if name in charts}
    for heading, table in (
        ("Validation", wording.validation_table(figures)),
        ("Float8 health: the worst layers", wording.worst_layer_table(figures)),
    ):
        if table is not None:
            yield "heading", heading
            yield "table", table
    yield from (("folded", (name, chart)) for name, chart in charts.items() if name.startswith("health_"))
    yield "heading", "How to read this"
    yield "notes", wording.reading_notes(figures)
    yield "heading", "Where it ran"
    yield "table", (("", ""), list(wording.environment_rows(figures)))
    yield "heading", "Commands"
    yield "code", figures["command"]
    if commands := [run["command"] for run in figures["runs"] if run["command"]]:
        yield "answer", "Command of each run:"
        yield "code", "\n".join(commands)


def html_page(figures: Mapping[str, Any], charts: Charts) -> str:
    title = escape(wording.report_title(figures))
    body = "\n".join(_HTML[kind](content) for kind, content in report_parts(figures, charts))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>{title}</title><style>{_STYLE.read_text()}</style></head>"
        f"<body>\n<h1>{title}</h1>\n{body}\n{page_scripts()}</body></html>\n"
    )


def markdown_page(figures: Mapping[str, Any], charts: Charts) -> str:
    parts = [f"# {_plain(wording.report_title(figures))}"]
    parts += [_MARKDOWN[kind](content) for kind, content in report_parts(figures, charts)]
    return "\n\n".join(parts) + "\n"


def _html_table(table: wording.Table) -> str:
    head, rows = table
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if any(head) else ""
    lines = "".join(f"<tr>{''.join(map(_html_cell, head, row))}</tr>" for row in rows)
    return f"<div class='wide'><table>{top}{lines}</table></div>"


def _html_cell(column: str, text: str) -> str:
    """A cell that knows its column's name, which a narrow page shows beside it."""
    word = text.partition(":")[0]
    verdict = f" class='{word}'" if word in ("inside", "outside") else ""
    return f"<td data-column='{escape(column)}'{verdict}>{escape(text)}</td>"


def _markdown_table(table: wording.Table) -> str:
    head, rows = table
    lines: list[Sequence[str]] = [head, ["---"] * len(head), *rows]
    cells = ((_plain(cell).replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _plain(text: str) -> str:
    """Escape `text` for one line of Markdown; a run's name is a folder's, which may contain anything."""
    return escape(text.replace("\n", " "), quote=False)


def _image(name: str, chart: Chart) -> str:
    return f"![{_plain(chart.title).replace(']', '')}]({name}.svg)"


_HTML: Mapping[str, Callable[[Any], str]] = {
    "answer": lambda text: f"<p class='answer'>{escape(text)}</p>",
    "warning": lambda text: f"<p class='warning'>{escape(text)}</p>",
    "heading": lambda text: f"<h2>{escape(text)}</h2>",
    "table": _html_table,
    "charts": lambda charts: f"<div class='charts'>{''.join(map(figure, charts, charts.values()))}</div>",
    "folded": lambda item: f"<details><summary>{escape(item[1].title)}</summary>{figure(*item)}</details>",
    "notes": lambda notes: f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>",
    "code": lambda text: f"<pre>{escape(text)}</pre>",
}
_MARKDOWN: Mapping[str, Callable[[Any], str]] = {
    "answer": _plain,
    "warning": lambda text: f"> **Note.** {_plain(text)}",
    "heading": lambda text: f"## {_plain(text)}",
    "table": _markdown_table,
    "charts": lambda charts: "\n\n".join(map(_image, charts, charts.values())),
    "folded": lambda item: (
        f"<details markdown><summary>{_plain(item[1].title)}</summary>\n\n{_image(*item)}\n\n</details>"
    ),
    "notes": lambda notes: "\n".join(f"- {_plain(note)}" for note in notes),
    "code": lambda text: f"```bash\n{text}\n```",
}
