"""The results that the documentation tells are those of the committed reports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from octavo.commands.compare.report import wording
from tests.docs.commands import ROOT

REPORT = ROOT / "docs" / "results" / "debugmodel_500"


@pytest.fixture(scope="module")
def read() -> dict[str, Any]:
    """The figures in the page."""
    page = (REPORT / "report.html").read_text()
    (data,) = re.findall("<script type='application/json'[^>]*>(.*?)</script>", page, re.S)
    found: dict[str, Any] = json.loads(data)
    return found


def rows(page: Path) -> list[str]:
    """The rows of a page's table of verdicts."""
    table = re.search(r"^\| run \| verdict .*\n\|[-| ]*\n((?:\|.*\n)*)", page.read_text(), re.M)
    assert table, page
    return table[1].splitlines()


def test_the_readme_has_the_reports_verdicts() -> None:
    told, known = rows(ROOT / "README.md"), rows(REPORT / "report.md")
    assert len(told) == 4
    assert set(told) <= set(known)


def test_both_pages_of_the_report_are_one_comparison_of_500_steps(read: dict[str, Any]) -> None:
    names = [run["name"] for run in read["runs"]]
    assert names[:4] == ["bf16", "tensorwise", "rowwise", "rowwise_with_gw_hp"]
    assert sum(name.startswith("bf16") for name in names) == 3
    assert all(run["smoothed"][-1][0] == 500 for run in read["runs"])
    table = dict(
        zip(
            (row.split(" | ")[0].strip("| ") for row in rows(REPORT / "report.md")),
            rows(REPORT / "report.md"),
            strict=True,
        )
    )
    for run in read["runs"]:
        if run["name"] != "bf16":
            step, gap = max(run["gaps"], key=lambda pair: abs(pair[1]))
            assert f"| {gap:+.4f} at step {step} |" in table[run["name"]]
            assert table[run["name"]].endswith(f"| {run['smoothed'][-1][1]:.4f} |")


def test_the_report_has_todays_columns() -> None:
    head, _ = wording.verdicts_of({"runs": [], "baseline": ""})
    assert f"| {' | '.join(head)} |" in (REPORT / "report.md").read_text()


def test_the_report_tells_no_place_of_a_machine() -> None:
    for path in REPORT.iterdir():
        assert not re.search(r"(?<![\w./])/(tmp|root|home|work)/", path.read_text()), path
