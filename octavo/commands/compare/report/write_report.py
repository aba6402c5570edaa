"""A report's files: report.html, report.md with its drawings, and report.json with all figures."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.commands.compare.report.drawings import drawings_of
from octavo.commands.compare.report.html_page import html_page
from octavo.commands.compare.report.markdown import markdown_page
from octavo.commands.compare.report.run_data import RunData
from octavo.commands.compare.report.svg import stand_alone


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
        _write(out / f"{name}.svg", stand_alone(drawing) + "\n")
    _write(out / "report.json", json.dumps(figures, indent=1) + "\n")
    _write(out / "report.md", markdown_page(figures, drawings))
    _write(out / "report.html", html_page(figures, drawings))
    return out / "report.html"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, path)
