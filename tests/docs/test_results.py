"""The results in the documentation are those of the committed reports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from octavo.commands.compare.report import wording
from tests.docs.commands import ROOT

REPORT = ROOT / "docs" / "results" / "debugmodel_500"


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """The figures in the HTML report."""
    page = (REPORT / "report.html").read_text()
    (text,) = re.findall("<script type='application/json'[^>]*>(.*?)</script>", page, re.S)
    figures: dict[str, Any] = json.loads(text)
    return figures


def rows(page: Path) -> list[str]:
    """The rows of the table of verdicts on `page`."""
    table = re.search(r"^\| run \| verdict .*\n\|[-| ]*\n((?:\|.*\n)*)", page.read_text(), re.M)
    assert table, page
    return table[1].splitlines()


def test_the_readme_has_the_reports_verdicts() -> None:
    shown = rows(ROOT / "README.md")
    assert len(shown) == 4
    assert set(shown) <= set(rows(REPORT / "report.md"))


def test_both_pages_of_the_report_are_one_comparison_of_500_steps(data: dict[str, Any]) -> None:
    names = [run["name"] for run in data["runs"]]
    assert names[:4] == ["bf16", "tensorwise", "rowwise", "rowwise_with_gw_hp"]
    assert sum(name.startswith("bf16") for name in names) == 3
    assert all(run["smoothed"][-1][0] == 500 for run in data["runs"])
    table = {row.split(" | ")[0].strip("| "): row for row in rows(REPORT / "report.md")}
    for run in data["runs"]:
        if run["name"] != "bf16":
            step, gap = max(run["gaps"], key=lambda pair: abs(pair[1]))
            assert f"| {gap:+.4f} at step {step} |" in table[run["name"]]
            assert table[run["name"]].endswith(f"| {run['smoothed'][-1][1]:.4f} |")


def test_the_report_has_the_columns_of_today() -> None:
    head, _ = wording.verdict_table({"runs": [], "baseline": ""})
    assert f"| {' | '.join(head)} |" in (REPORT / "report.md").read_text()


def test_the_report_has_no_path_of_a_machine() -> None:
    for path in REPORT.iterdir():
        assert not re.search(r"(?<![\w./])/(tmp|root|home|work)/", path.read_text()), path
