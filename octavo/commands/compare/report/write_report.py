"""Writes a report's files: report.html, report.md with its drawings, and report.json with all figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.commands.charts import to_svg
from octavo.commands.compare.report.drawings import draw_charts
from octavo.commands.compare.report.pages import html_page, markdown_page
from octavo.core.fs import write_file


def write_report(out: Path, figures: Mapping[str, Any]) -> Path:
    """Write report.html, report.md, the drawings and report.json into `out`; returns the path of the page."""
    charts = draw_charts(figures)
    out.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        write_file(out / f"{name}.svg", to_svg(chart))
    write_file(out / "report.json", json.dumps(figures, indent=1) + "\n")
    write_file(out / "report.md", markdown_page(figures, charts))
    write_file(out / "report.html", html_page(figures, charts))
    return out / "report.html"
