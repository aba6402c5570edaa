"""A report's files: report.html, report.md with its drawings, and report.json with all figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.commands.compare.report.drawings import drawings_of
from octavo.commands.compare.report.html_page import html_page
from octavo.commands.compare.report.markdown import markdown_page
from octavo.commands.compare.report.run_data import RunData
from octavo.commands.compare.report.svg import stand_alone
from octavo.core.fs import write_file


def environment_of(base: RunData) -> dict[str, Any]:
    """Where the baseline ran, from its record."""
    record = base.record
    return {
        "device": record.get("device"),
        "processor": record.get("cpu"),
        "processes": record.get("processes"),
        "threads of a process": record.get("threads"),
        "high precision": record.get("high_precision_dtype"),
        "octavo": record.get("octavo"),
        "commit": record.get("commit"),
        "torch": record.get("torch"),
        "CUDA": record.get("cuda"),
        "Python": record.get("python"),
        "system": record.get("platform"),
    }


def model_of(base: RunData) -> str:
    """The model's name, from the baseline's configuration."""
    model = base.config.get("model", {})
    return f"{model.get('name')} {model.get('flavor')}"


def write_report(out: Path, figures: Mapping[str, Any]) -> Path:
    """Write all files into `out`, each whole or not at all; returns the page's path."""
    drawings = drawings_of(figures)
    out.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        write_file(out / f"{name}.svg", stand_alone(drawing) + "\n")
    write_file(out / "report.json", json.dumps(figures, indent=1) + "\n")
    write_file(out / "report.md", markdown_page(figures, drawings))
    write_file(out / "report.html", html_page(figures, drawings))
    return out / "report.html"
