"""The HTML report in a real browser, if there is one."""

from pathlib import Path

import pytest

from octavo.commands.compare.report.figures import figures_of
from octavo.commands.compare.report.run_data import load_run
from octavo.commands.compare.report.write_report import write_report
from tests.commands.compare.report.browser import find_browser, opened
from tests.commands.compare.report.writing import falling, write_run

BROWSER = find_browser()


@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: apt-get install chromium, or name one in OCTAVO_TEST_BROWSER"
)
def test_the_page_draws_reads_and_asks_nobody(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / "bf16", falling())),
        load_run(write_run(tmp_path / "rowwise", falling(0.01), recipe="rowwise")),
        load_run(write_run(tmp_path / "seed", falling(0.05, 0.02), seed=43, data_seed=42), kind="seed"),
        load_run(write_run(tmp_path / "bad", falling(2.0), recipe="tensorwise"), kind="control"),
    ]
    (runs[1].folder / "health.jsonl").write_text(
        '{"step": 10, "layer": "w1", "operand": "input", "flushed": 0.1, "sqnr": 20.0}\n'
    )
    runs[1] = load_run(runs[1].folder)
    figures = figures_of(runs, command="octavo compare A B")
    file = write_report(tmp_path / "out", figures)
    assert BROWSER is not None
    with opened(BROWSER, file, tmp_path / "profile") as page:
        page.wait_for("document.querySelectorAll('figure:not(details *) svg').length === 7")
        curves = "document.querySelectorAll('#losses .mark-line path[stroke-width=\"1.8\"]')"
        assert page.evaluate(f"[...{curves}].map((path) => path.getTotalLength() > 100)") == [True, True]

        page.point_at("#losses .background")
        page.wait_for("document.querySelector('#vg-tooltip-element.visible')")
        rows = "[...document.querySelectorAll('#vg-tooltip-element tr')]"
        read = dict(page.evaluate(f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))"))
        read = {name.rstrip(":"): value for name, value in read.items()}
        step = int(read.pop("step"))
        assert 25 <= step <= 40
        for run in figures["runs"]:
            assert read[run["name"]] == f"{dict(map(tuple, run['smoothed']))[step]:.4f}"

        page.evaluate("document.querySelector('details').open = true")
        page.wait_for("document.querySelector('#health_rowwise_input .mark-rect path')")
        page.point_at("#health_rowwise_input .mark-rect path")
        page.wait_for("document.getElementById('vg-tooltip-element').innerText.includes('w1')")
        assert "10" in page.evaluate("document.getElementById('vg-tooltip-element').innerText")

        for mode in ("light", "dark"):
            page.call(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}]
            )
            page.call(
                "Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=True
            )
            page.open(file)
            page.wait_for("document.querySelectorAll('figure:not(details *) svg').length === 7")
            inside = "(e) => e.getBoundingClientRect().right <= innerWidth + 1"
            assert page.evaluate(f"[...document.querySelectorAll('td, svg, svg text')].every({inside})")
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (ink, paper) == {
                "light": ("rgb(26, 26, 26)", "rgb(255, 255, 255)"),
                "dark": ("rgb(232, 232, 232)", "rgb(22, 24, 27)"),
            }[mode]
        assert page.errors == []
        assert page.requests
        assert all(address.startswith(("file:", "data:")) for address in page.requests)
