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
        assert page.evaluate("document.querySelectorAll('svg').length") == 9
        boxes = "[...document.querySelectorAll('svg')].map((s) => s.getBoundingClientRect())"
        sizes = page.evaluate(f"{boxes}.map((b) => [b.width, b.height])")
        assert all(width > 100 and height > 30 for width, height in sizes)
        drawn = "[...document.querySelectorAll('#{} g.line path')].every((p) => p.getTotalLength() > 100)"
        assert page.evaluate("document.querySelectorAll('#losses g.line').length") == 4
        assert page.evaluate(drawn.format("losses"))
        assert page.evaluate("document.querySelector('#gaps .band').getBBox().height") > 10
        assert page.evaluate("document.querySelectorAll('.cells').length") == 2

        page.evaluate("document.getElementById('losses').scrollIntoView()")
        middle = "[0, 1].map((i) => i ? b.top + b.height / 2 : b.left + b.width / 2)"
        box = page.evaluate(
            f"[document.getElementById('losses').getBoundingClientRect()].map((b) => {middle})[0]"
        )
        page.move_pointer(*box)
        page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        reading = page.evaluate("document.getElementById('reading').textContent")
        step = int(reading.partition(":")[0].removeprefix("step "))
        smoothed = {run["name"]: dict(map(tuple, run["smoothed"])) for run in figures["runs"]}
        assert 25 <= step <= 40
        for name, losses in smoothed.items():
            assert f"{name} {losses[step]:.4f}" in reading

        heatmap = "document.getElementById('health_rowwise_input')"
        page.evaluate(f"{heatmap}.scrollIntoView()")
        cells = f"{heatmap}.querySelector('.cells').getBoundingClientRect()"
        page.move_pointer(*page.evaluate(f"[{cells}].map((b) => {middle})[0]"))
        page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        assert page.evaluate(f"{heatmap}.querySelector('.reading').textContent") == "w1, step 10: 10 %"

        page.evaluate("document.querySelector('button[data-run=rowwise]').click()")
        hidden = "[...document.querySelectorAll('g.line')].filter((g) => g.style.display === 'none').length"
        assert page.evaluate(hidden) == 3
        assert page.errors == []
        assert page.requests
        assert all(address.startswith(("file:", "data:")) for address in page.requests)
