"""The results in the documentation are those of the committed reports."""

import json
import re
from pathlib import Path
from typing import Any

from octavo.commands.compare.report import wording
from tests.docs.commands import ROOT

REPORT = ROOT / "docs" / "results" / "debugmodel_500"


def curves(chart: str) -> dict[str, dict[int, float]]:
    """What a chart of the HTML report shows: run -> step -> value."""
    page = (REPORT / "report.html").read_text()
    found = re.search(f"<figure id='{chart}'>.*?<script type='application/json'>(.*?)</script>", page, re.S)
    assert found
    spec: dict[str, Any] = json.loads(found[1])
    columns = {shown["title"]: shown["field"] for shown in spec["layer"][-1]["encoding"]["tooltip"][1:]}
    lines = spec["data"]["values"]
    return {
        run: {row["step"]: row[column] for row in lines if column in row} for run, column in columns.items()
    }


def rows(page: Path) -> list[str]:
    """The rows of the table of verdicts on `page`."""
    table = re.search(r"^\| run \| verdict .*\n\|[-| ]*\n((?:\|.*\n)*)", page.read_text(), re.M)
    assert table, page
    return table[1].splitlines()


def test_the_readme_has_the_reports_verdicts() -> None:
    shown = rows(ROOT / "README.md")
    assert len(shown) == 4
    assert set(shown) <= set(rows(REPORT / "report.md"))


def test_both_pages_of_the_report_are_one_comparison_of_500_steps() -> None:
    losses, gaps = curves("losses"), curves("gaps")
    assert {"bf16", "tensorwise", "rowwise", "rowwise_with_gw_hp"} < losses.keys()
    assert sum(name.startswith("bf16") for name in losses) == 3
    table = {row.split(" | ")[0].strip("| "): row for row in rows(REPORT / "report.md")}
    assert losses.keys() - {"bf16"} == gaps.keys() == table.keys()
    for run, gap in gaps.items():
        assert max(losses[run]) == 500
        step = max(gap, key=lambda at: abs(gap[at]))
        assert f"| {gap[step]:+.4f} at step {step} |" in table[run]
        assert table[run].endswith(f"| {losses[run][500]:.4f} |")


def test_the_report_has_the_columns_of_today() -> None:
    head, _ = wording.verdict_table({"runs": [], "baseline": ""})
    assert f"| {' | '.join(head)} |" in (REPORT / "report.md").read_text()


def test_the_report_has_no_path_of_a_machine() -> None:
    for path in REPORT.iterdir():
        assert not re.search(r"(?<![\w./])/(tmp|root|home|work)/", path.read_text()), path
