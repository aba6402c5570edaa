"""A report's figures against an independent computation from the runs' files, and in both pages."""

import json
import math
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.commands.compare.report.figures import choose_baseline, figures_of
from octavo.commands.compare.report.run_data import load_run
from octavo.commands.compare.report.write_report import write_report
from octavo.config import ConfigError
from tests.commands.compare.report.writing import falling, write_run

STEPS, WINDOW = 60, 3  # a twentieth


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; `tests/commands/test_charts.py` and `test_browser.py` do it."""
    monkeypatch.setattr("octavo.commands.compare.report.write_report.to_svg", lambda chart: chart.to_json())
    monkeypatch.setattr("octavo.commands.compare.report.pages.page_scripts", lambda: "")


def told(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in figures["runs"]}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    runs = tmp_path / "runs"
    return {
        "bf16": write_run(runs / "bf16", falling()),
        "rowwise": write_run(
            runs / "rowwise", falling(0.004, 0.002), recipe="rowwise", seconds=0.25, memory=0.75
        ),
        "bad": write_run(runs / "bad", lambda s: falling()(s) + 0.02 * s, recipe="tensorwise"),
        "seed43": write_run(runs / "seed43", falling(0.05, 0.03, 1.0), seed=43, data_seed=42),
        "seed44": write_run(runs / "seed44", falling(-0.04, 0.03, 2.0), seed=44, data_seed=42),
    }


def rewriting(old: str, new: str) -> Callable[[Path], object]:
    """Return a function that replaces text in the metrics of a run's folder."""

    def damage(folder: Path) -> object:
        path = folder / "metrics.jsonl"
        return path.write_text(path.read_text().replace(old, new))

    return damage


def load_all(folders: dict[str, Path]) -> list[Any]:
    kinds = {"seed43": "seed", "seed44": "seed"}
    return [
        load_run(folder, name=name, kind=kinds[name]) if name in kinds else load_run(folder, name=name)
        for name, folder in folders.items()
    ]


def column(folder: Path, name: str) -> np.ndarray:
    return np.array([json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def losses(folder: Path) -> np.ndarray:
    return column(folder, "loss")


def means(values: np.ndarray) -> np.ndarray:
    """Trailing means, by cumulative sums."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW


def test_every_figure_follows_from_the_metrics(folders: dict[str, Path]) -> None:
    figures = figures_of(load_all(folders))
    runs = told(figures)
    base = losses(folders["bf16"])
    seeds = np.stack([means(losses(folders[name])) for name in ("bf16", "seed43", "seed44")])
    variances = seeds.var(axis=0, ddof=1)
    half = max(WINDOW, len(variances) // 10)
    spread = [variances[max(0, i - half) : i + half + 1].mean() for i in range(len(variances))]
    band = 4.303 * np.sqrt(2 * np.array(spread))  # Student, two degrees of freedom
    steps = np.arange(WINDOW, STEPS + 1)
    assert figures["window"] == WINDOW
    assert [step for step, _ in figures["band"]] == steps.tolist()
    np.testing.assert_allclose([width for _, width in figures["band"]], band, rtol=1e-9)

    target = means(base)[44 - WINDOW + 1]  # of step 45, three quarters of the way
    assert figures["target_loss"] == pytest.approx(target)
    for name in ("rowwise", "bad"):
        run, own = runs[name], losses(folders[name])
        gaps = means(own - base)
        np.testing.assert_allclose([gap for _, gap in run["gaps"]], gaps, atol=1e-12)
        at = int(np.argmax(np.abs(gaps) / band))
        assert run["widest"]["step"] == steps[at]
        assert run["widest"]["share"] == pytest.approx(abs(gaps[at]) / band[at])
        assert run["largest_gap"]["step"] == steps[np.argmax(np.abs(gaps))]
        assert run["final_loss"] == pytest.approx(own[-WINDOW:].mean())
        late = (own - base)[STEPS // 2 :]
        late = late[len(late) - len(late) // 8 * 8 :]
        assert run["mean_gap"]["mean"] == pytest.approx(late.mean())
        assert run["median_tps"] == pytest.approx(np.median(column(folders[name], "tps")[1:]))
        assert run["median_step_seconds"] == pytest.approx(np.median(column(folders[name], "seconds")[1:]))
        assert run["peak_memory_gib"] == column(folders[name], "memory_gib").max()
        below = np.flatnonzero(means(own) <= target)
        if len(below):
            step = steps[below[0]]
            assert run["target"]["tokens"] == 2048 * step
            assert run["target"]["seconds"] == pytest.approx(step * run["median_step_seconds"])
        else:
            assert run["target"] is None
    assert runs["rowwise"]["verdict"] == "inside"
    assert runs["bad"]["verdict"] == "outside"
    ratio = runs["bf16"]["target"]["seconds"] / runs["rowwise"]["target"]["seconds"]
    assert runs["rowwise"]["speedup_to_target"] == pytest.approx(ratio)
    assert runs["rowwise"]["tps_ratio"] == pytest.approx(2, rel=0.01)
    slope = -np.polyfit(steps[len(steps) // 2 :], means(base)[len(steps) // 2 :], 1)[0]
    assert runs["rowwise"]["steps_behind"] == pytest.approx(runs["rowwise"]["mean_gap"]["mean"] / slope)


def report(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    runs = load_all(folders)
    figures = figures_of(runs, command="octavo compare --steps 60")
    write_report(out, figures)
    return figures


def test_both_pages_have_the_figures(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    figures = report(folders, out)
    runs = told(figures)
    mean, behind = runs["rowwise"]["mean_gap"], runs["rowwise"]["steps_behind"]
    steady = f"rowwise {mean['mean']:+.4f} ± {mean['half_width']:.4f} nats ({behind:.1f} steps behind)"
    for text in (page_text(out), (out / "report.md").read_text()):
        for name in ("rowwise", "bad"):
            run = runs[name]
            assert f"{run['widest']['share']:.3f} at step {run['widest']['step']}" in text
            assert f"{run['largest_gap']['gap']:+.4f} at step {run['largest_gap']['step']}" in text
            assert f"{run['mean_gap']['mean']:+.5f}" in text
            assert f"{run['median_tps']:,.0f}" in text
            assert f"{run['peak_memory_gib']:.2f}" in text
        assert steady in text
        assert "octavo compare --steps 60" in text
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(figures))


def page_text(out: Path) -> str:
    return unescape(re.sub("<[^>]*>", " ", (out / "report.html").read_text()))


def specs(out: Path) -> dict[str, Any]:
    """What the page draws: name of a figure -> its specification."""
    page = (out / "report.html").read_text()
    found = re.findall("<figure id='(.*?)'>.*?<script type='application/json'>(.*?)</script>", page, re.S)
    return {name: json.loads(spec) for name, spec in found}


def test_the_charts_have_the_figures(folders: dict[str, Path], tmp_path: Path) -> None:
    figures = report(folders, tmp_path)
    for chart, column in (("losses", "smoothed"), ("gaps", "gaps")):
        spec = specs(tmp_path)[chart]
        tooltips = spec["layer"][-1]["encoding"]["tooltip"][1:]
        for tooltip in tooltips:
            field = tooltip["field"]
            shown = {row["step"]: row[field] for row in spec["data"]["values"] if field in row}
            assert shown == pytest.approx(dict(map(tuple, told(figures)[tooltip["title"]][column])), rel=1e-5)
        assert {tooltip["title"] for tooltip in tooltips} >= {"rowwise", "bad", "seed43"}
    speeds = json.dumps(specs(tmp_path)["tps"])
    assert f"{told(figures)['rowwise']['median_tps']:,.0f}" in speeds


def test_the_page_names_no_address(folders: dict[str, Path], tmp_path: Path) -> None:
    report(folders, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "://" not in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    markdown = (tmp_path / "out" / "report.md").read_text()
    for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown):
        assert (tmp_path / "out" / name).exists()


def test_health_becomes_a_grid_of_layers_and_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {
            "step": step,
            "layer": layer,
            "operand": operand,
            "recipe": "rowwise",
            "gemms": [gemm],
            "flushed": 0.01 * step * share,
            "saturated": 0.0,
            "sqnr": 25.0 / share,
        }
        for gemm, share in (("output", 1.0), ("grad_weight", 0.5))
        for step in (10, 20)
        for layer in ("layers.0.w1", "layers.1.w1")
        for operand in ("input", "grad_output")
        if (step, layer) != (20, "layers.0.w1")
    ]
    (folders["rowwise"] / "health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = report(folders, tmp_path / "out")
    grid = told(figures)["rowwise"]["health"]["grad_output"]
    assert grid["layers"] == ["layers.0.w1", "layers.1.w1"]
    assert grid["steps"] == [10, 20]
    assert grid["flushed"] == [[0.1, None], [0.1, 0.2]]  # the worse of the operand's two casts
    assert grid["sqnr"] == [[25.0, None], [25.0, 25.0]]
    assert specs(tmp_path / "out")["health_rowwise_grad_output"]["data"]["values"] == [
        {"layer": "layers.0.w1", "10": 10.0, "20": None},
        {"layer": "layers.1.w1", "10": 10.0, "20": 20.0},
    ]
    for text in (page_text(tmp_path / "out"), (tmp_path / "out" / "report.md").read_text()):
        assert "20.00%: layers.1.w1, step 20" in text
        assert "25.0 dB: layers.0.w1, step 10" in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data_seed": 7}, "it read other batches"),
        (
            {"data_seed": 42, "settings": {"lr": 1e-2}},
            "it has another configuration (optimizer.lr is 0.01, not 0.001)",
        ),
        (
            {"data_seed": 42, "tokens": 4096},
            "it read other batches: 245,760 tokens where bf16 had read 122,880",
        ),
    ],
)
def test_a_run_that_differs_in_more_than_its_weights_gives_no_noise(
    folders: dict[str, Path], changes: dict[str, Any], why: str
) -> None:
    """It would widen the band until any recipe is inside."""
    before = figures_of(load_all(folders))
    shutil.rmtree(folders["seed44"])
    write_run(folders["seed44"], lambda s: falling()(s) + 3 / s, seed=44, **changes)
    figures = figures_of(load_all(folders))
    assert figures["seeds"] == [42, 43]
    assert told(figures)["bad"]["verdict"] == "outside"
    assert any(f"seed44 is excluded from the noise band of bf16: {why}" in w for w in figures["warnings"])
    folders.pop("seed44")
    assert figures["band"] == figures_of(load_all(folders))["band"] != before["band"]


VERDICTS: list[tuple[dict[str, Any], str, str | None]] = [
    (
        {"every": 10},
        "not judged",
        "it reports its loss every 10 steps and bf16 every 1; train both with one metrics.log_freq",
    ),
    # as a run with more processes has, with the same configuration
    (
        {"tokens": 4096},
        "not judged",
        "it read 245,760 tokens in the steps in which bf16 read 122,880",
    ),
    ({"flavor": "8B"}, "not judged", "it has another model.flavor than bf16"),
    ({"steps": 1}, "not judged", "it is too short"),
    ({"steps": 50}, "not judged", "inside, but only known up to step 50 of 60"),
    ({"steps": 60}, "inside", None),
    ({"steps": 70}, "inside", None),
    (
        {"loss": lambda s: falling()(s) if s < 40 else None, "steps": 40},
        "outside",
        "it ended at step 40, because its numbers were not finite",
    ),
    (
        {"loss": lambda s: None if s == 30 else falling()(s)},
        "outside",
        "its loss was not finite in step 30",
    ),
    ({"loss": falling(9.0), "steps": 3}, "outside", None),
]


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    VERDICTS,
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_the_verdict_on_a_run(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], verdict: str, reason: str | None
) -> None:
    settings = {"loss": falling(), "recipe": "rowwise", **changes}
    folders["run"] = write_run(tmp_path / "run", **settings)
    figures = figures_of(load_all(folders))
    run = told(figures)["run"]
    assert (run["verdict"], run["verdict_reason"]) == (verdict, reason)
    if "every" in changes:  # a mean of as many losses would cover other steps
        assert run["final_loss"] is run["target"] is None
    if "tokens" in changes:
        assert (run["same_batches"], run["mean_gap"]) == (False, None)
    if reason == "it ended at step 40, because its numbers were not finite":
        assert run["final_loss"] is None
        assert any("run: the loss was not finite in step 40" in each for each in figures["warnings"])


def test_a_run_far_behind_is_looked_up(folders: dict[str, Path], tmp_path: Path) -> None:
    folders["far"] = write_run(tmp_path / "far", lambda s: 4 + 4 * max(1.0, s / 3) ** -0.5, recipe="rowwise")
    folders["ahead"] = write_run(tmp_path / "ahead", falling(-9.0), recipe="rowwise")
    runs = told(figures_of(load_all(folders)))
    smoothed = dict(map(tuple, runs["bf16"]["smoothed"]))
    end = dict(map(tuple, runs["far"]["smoothed"]))[STEPS]
    reached = next(step for step, loss in smoothed.items() if loss <= end)
    assert runs["far"]["steps_behind"] == STEPS - reached > 15
    assert runs["ahead"]["steps_behind"] is None  # the baseline never had that loss


def test_runs_of_like_names_keep_their_own_heatmaps(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, flushed in (("a-b", 0.25), ("a_b", 0.5)):
        folders[name] = write_run(tmp_path / name, falling(), recipe="rowwise")
        row = {"step": 10, "layer": "w1", "operand": "input", "flushed": flushed, "sqnr": 20.0}
        (folders[name] / "health.jsonl").write_text(json.dumps(row) + "\n")
    report(folders, tmp_path / "out")
    titles = [json.loads(path.read_text())["title"] for path in (tmp_path / "out").glob("health_*.svg")]
    assert len(titles) == len(set(titles)) == 4
    assert {title.partition(":")[0] for title in titles} == {"a-b, input", "a_b, input"}


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"settings": {"lr": 2e-3}}, "optimizer.lr is 0.002, not 0.001"),
        ({"steps": 50}, "other ends at step 50, bf16 at step 60"),
        ({"seed": 7}, "other read its batches in another order than bf16"),
        ({"seed": 7, "data_seed": 42}, "other started from other initial weights than bf16"),
        ({"tokens": 1024}, "other read other batches than bf16: 61,440 tokens where bf16 had read 122,880"),
    ],
)
def test_runs_that_do_not_match_are_warned_about(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], warning: str
) -> None:
    folders["other"] = write_run(tmp_path / "other", falling(), recipe="rowwise", **changes)
    figures = report(folders, tmp_path / "out")
    assert any(warning in each for each in figures["warnings"]), figures["warnings"]
    assert warning in unescape((tmp_path / "out" / "report.html").read_text())
    assert warning in (tmp_path / "out" / "report.md").read_text()


def test_a_control_that_ends_early_is_outside_without_a_warning(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def losing(step: int) -> float:
        return falling()(step) + 0.05 * step

    folders["control"] = write_run(tmp_path / "control", losing, recipe="unscaled_e5m2", steps=40)
    figures = figures_of(load_all(folders))
    assert told(figures)["control"]["verdict"] == "outside"
    assert figures["control_outside"] is True
    assert 0 < told(figures)["control"]["steps_behind"] < 40
    assert not [each for each in figures["warnings"] if "ends at step" in each]


def test_a_baseline_that_failed_judges_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.rmtree(folders["bf16"])
    write_run(folders["bf16"], lambda s: falling()(s) if s < 30 else None, steps=30)
    figures = report(folders, tmp_path / "out")
    verdicts = {name: run["verdict"] for name, run in told(figures).items()}
    assert verdicts["rowwise"] == verdicts["bad"] == "not judged"
    assert figures["warnings"][0].startswith(
        "bf16, the baseline, ended at step 30 because its numbers were not"
    )


def test_a_seed_that_failed_ends_the_band(folders: dict[str, Path]) -> None:
    shutil.rmtree(folders["seed44"])
    write_run(folders["seed44"], lambda s: falling()(s) if s < 30 else None, steps=30, seed=44, data_seed=42)
    figures = figures_of(load_all(folders))
    rowwise = told(figures)["rowwise"]
    assert rowwise["verdict"] == "not judged"
    assert rowwise["verdict_reason"] == "inside, but only known up to step 29 of 60"
    assert any("seed44 ended at step 30" in each for each in figures["warnings"])


def test_a_control_inside_withdraws_the_verdicts(folders: dict[str, Path], tmp_path: Path) -> None:
    control = load_run(write_run(tmp_path / "c", falling(), recipe="tensorwise"), name="c", kind="control")
    figures = figures_of([*load_all(folders), control])
    runs = told(figures)
    assert figures["control_outside"] is False
    assert any("too insensitive to judge anything" in each for each in figures["warnings"])
    assert runs["rowwise"]["verdict"] == runs["seed43"]["verdict"] == "not judged"
    assert runs["rowwise"]["verdict_reason"] == "inside, but the control c is not outside"
    assert runs["bad"]["verdict"] == "outside"


def test_the_baseline_is_the_run_that_most_others_belong_to(folders: dict[str, Path]) -> None:
    runs = [load_run(folders[name], name=name) for name in ("seed43", "bf16", "rowwise")]
    assert choose_baseline(runs).name == "bf16"
    assert choose_baseline(runs[:1] + runs[2:]).name == "seed43"
    assert choose_baseline(runs[2:]).name == "rowwise"
    warnings = figures_of(runs[2:])["warnings"]
    assert "All runs are in float8; rowwise, in rowwise, is used as the baseline." in warnings


def test_a_gap_to_another_run_than_the_baseline_is_a_caution(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folders["rowwise43"] = write_run(tmp_path / "r", falling(), recipe="rowwise", seed=43, data_seed=42)
    figures = figures_of(load_all(folders))
    assert told(figures)["rowwise43"]["compared_with"] == "seed43"
    assert any("rowwise43 is compared with seed43" in each for each in figures["warnings"])


def test_names_of_folders_are_text_in_markdown(folders: dict[str, Path], tmp_path: Path) -> None:
    folders["<img src=x>|"] = folders.pop("rowwise")
    report(folders, tmp_path / "out")
    written = (tmp_path / "out" / "report.md").read_text()
    assert "<img" not in written
    assert "&lt;img src=x&gt;\\|" in written


def test_one_seed_judges_nothing(folders: dict[str, Path]) -> None:
    figures = figures_of([load_run(folders[name], name=name) for name in ("bf16", "rowwise")])
    assert told(figures)["rowwise"]["verdict"] == "not judged"
    assert any("its noise is not known" in each for each in figures["warnings"])


def test_a_target_that_is_given(folders: dict[str, Path]) -> None:
    figures = figures_of(load_all(folders), target=5.0)
    assert figures["target_loss"] == 5.0
    step = told(figures)["bf16"]["target"]["step"]
    smoothed = dict(map(tuple, told(figures)["bf16"]["smoothed"]))
    assert smoothed[step] <= 5.0 < smoothed[step - 1]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "run.json").unlink(), "is not a run's folder"),
        (lambda f: (f / "run.json").write_text("[]"), "was not written by a run of octavo"),
        (lambda f: (f / "metrics.jsonl").unlink(), "has no loss"),
        (
            rewriting('"loss": ', '"loss": "x", "was": '),
            "loss is 'x' instead of a number, .* step 1; .*damaged",
        ),
        (rewriting('"step": 1,', '"step": true,'), "step is True instead of a number"),
        (rewriting('"tps": ', '"tps": null, "was": '), "tps is None instead of a number"),
        (rewriting('"memory_gib": ', '"was": '), "memory_gib is None instead of a number"),
        (rewriting('{"step": 5,', '{"step": 5;'), "metrics.jsonl, line 5: is not a JSON object"),
    ],
)
def test_folders_that_are_no_runs(folders: dict[str, Path], break_it: Any, message: str) -> None:
    break_it(folders["bf16"])
    with pytest.raises(ConfigError, match=message):
        load_run(folders["bf16"])


def test_a_torn_last_line_is_passed_over(folders: dict[str, Path]) -> None:
    path = folders["bf16"] / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert load_run(folders["bf16"]).reports[-1]["step"] == STEPS - 1
    assert math.isfinite(load_run(folders["bf16"]).losses[STEPS - 1])
