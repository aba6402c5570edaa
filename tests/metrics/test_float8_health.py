"""Warnings about float8 name the layer and what helps, once; the file survives a resume; measuring changes no
bit of the training. (`tests/float8/health/test_health.py` holds the numbers against their definitions.)
"""

import json
from dataclasses import dataclass

import pytest

from octavo.config import ConfigError, JobConfig
from octavo.config.schema import Float8
from octavo.metrics import float8_health
from octavo.metrics.float8_health import HealthReport, curves, findings
from octavo.preflight import check
from tests.helpers import launching


@dataclass(frozen=True)
class HealthRow:
    layer: str = "layers.3.feed_forward.w2"
    recipe: str = "tensorwise"
    operand: str = "grad_output"
    gemms: tuple[str, ...] = ("grad_input", "grad_weight")
    values: int = 1000
    amax: float = 2.0
    flushed: float = 0.0
    saturated: float = 0.0
    nonfinite: float = 0.0
    sqnr: float = 30.0


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(float8_health.logger, "warning", lambda text, *args: lines.append(text % args))
    return lines


SETTINGS = Float8(filter_fqns=["output"], health_every=10)


def never(layer):
    raise AssertionError("no trial is due")


def rowwise(**numbers):
    """A trial in which rowwise gives `numbers`."""
    return lambda layer: (
        [HealthRow(), HealthRow(recipe="rowwise", gemms=("grad_input",), **numbers)],
        ["rowwise"],
    )


def test_names_the_layer_the_loss_and_both_remedies(warnings):
    HealthReport(SETTINGS, None).judge(
        40, [HealthRow(), HealthRow(layer="x"), HealthRow(flushed=0.12)], rowwise(flushed=0.004)
    )
    assert warnings == [
        "Step 40: layers.3.feed_forward.w2 grad_output: 12% flushed to zero in tensorwise; "
        "rowwise gives 0.4%: --float8.layer_recipes=layers.3.feed_forward.w2=rowwise, or "
        "keep this layer in high precision: "
        "--float8.filter_fqns=output,layers.3.feed_forward.w2"
    ]


def test_a_recipe_that_is_no_better_is_not_named(warnings):
    HealthReport(SETTINGS, None).judge(40, [HealthRow(flushed=0.12)], rowwise(flushed=0.11))
    assert warnings == [
        "Step 40: layers.3.feed_forward.w2 grad_output: 12% flushed to zero in tensorwise; "
        "keep this layer in high precision: --float8.filter_fqns=output,layers.3.feed_forward.w2"
    ]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (HealthRow(saturated=0.02), "2% saturated in tensorwise"),
        (HealthRow(sqnr=12.34), "12.3 dB between values and rounding error in tensorwise"),
    ],
)
def test_other_limits(warnings, row, part):
    HealthReport(SETTINGS, None).judge(1, [row], rowwise())
    assert part in warnings[0]
    assert "--float8.layer_recipes=layers.3.feed_forward.w2=rowwise" in warnings[0]


def test_no_warning_within_the_limits(warnings):
    edge = HealthRow(flushed=0.05, saturated=0.01, sqnr=15.0)
    HealthReport(SETTINGS, None).judge(1, [edge], never)
    assert warnings == []
    assert not findings(
        [HealthRow(flushed=0.5, nonfinite=0.1), HealthRow(sqnr=float("nan"), amax=float("inf"))], SETTINGS
    )


def test_the_same_warning_comes_once_and_again_when_twice_as_bad(warnings):
    report, tried = HealthReport(SETTINGS, None), []

    def trial(layer):
        tried.append(layer)
        return [], []

    for step, flushed in enumerate([0.12, 0.12, 0.2, 0.24, 0.25, 0.3]):
        report.judge(step, [HealthRow(flushed=flushed)], trial)
    assert [line.split(":")[0] for line in warnings] == ["Step 0", "Step 4"]
    assert len(tried) == 1  # trials are dear


def test_the_three_worst_have_a_line_each_and_the_rest_are_listed(warnings):
    rows = [HealthRow(layer=f"layers.{n}", flushed=n / 10) for n in range(1, 8)]
    HealthReport(SETTINGS, None).judge(5, rows, rowwise())
    assert [line.split()[2] for line in warnings[:3]] == ["layers.7", "layers.6", "layers.5"]
    assert warnings[3:] == [
        "Step 5: also beyond the limits of [float8]: grad_output flushed to zero in layers.4 40%, "
        "layers.3 30%, layers.2 20%, layers.1 10%. See health.jsonl",
        "Step 5: to keep all 7 layers reported so far in high precision: --float8.filter_fqns=output,"
        + ",".join(f"layers.{n}" for n in range(7, 0, -1)),
    ]


def test_many_layers_are_a_matter_of_the_recipe(warnings):
    rows = [HealthRow(layer=f"layers.{n}", flushed=0.5 - n / 100) for n in range(30)]
    HealthReport(SETTINGS, None).judge(5, rows, rowwise())
    assert warnings[3].endswith("layers.26 24% and 3 more. See health.jsonl")
    assert warnings[4].startswith("Step 5: 30 layers are beyond the limits of [float8]; use a finer recipe")


def test_the_rest_is_listed_by_operand_and_limit(warnings):
    rows = [
        *(HealthRow(layer=f"layers.{n}", flushed=n / 10) for n in range(1, 6)),
        HealthRow(layer="layers.7", operand="input", saturated=0.3),
    ]
    HealthReport(SETTINGS, None).judge(5, rows, rowwise())
    assert warnings[3].endswith(
        "[float8]: grad_output flushed to zero in layers.2 20%, layers.1 10%; "
        "input saturated in layers.7 30%. See health.jsonl"
    )


def test_curves_show_the_worst_cast_of_an_operand():
    rows = [
        HealthRow(gemms=("grad_input",), flushed=0.1, sqnr=20.0),
        HealthRow(gemms=("grad_weight",), sqnr=10.0, amax=3.0),
    ]
    place = "float8_health/layers.3.feed_forward.w2.grad_output"
    assert curves(rows) == {
        f"{place}/amax": 3.0,
        f"{place}/flushed(%)": 10.0,
        f"{place}/saturated(%)": 0.0,
        f"{place}/sqnr(dB)": 10.0,
    }
    assert curves([HealthRow(sqnr=float("inf"))]).keys() == curves([HealthRow()]).keys() - {
        f"{place}/sqnr(dB)"
    }


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_what_cannot_be_measured_is_told_at_once(axis):
    job = JobConfig()
    job.model.converters, job.float8.health_every = ["float8"], 10
    setattr(job.parallelism, f"{axis}_parallel_degree", 2)
    with pytest.raises(ConfigError, match=f"float8.health_every = 10 .*{axis}_parallel_degree = 2"):
        check(job, world_size=2)


def lines(folder):
    return [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]


HEALTH = {**launching.recipe("tensorwise"), "float8.health_every": 2}


def test_measures_what_a_training_step_casts(tmp_path):
    """Every second step, every layer; measuring changes no bit; a resumed run has each step once. On two
    processes, the numbers of the weights stay, and those of the rest are over all tokens.
    """
    saved = {"checkpoint.enable": "true", "checkpoint.interval": 2}
    plain = launching.train(
        tmp_path / "plain", {**launching.recipe("tensorwise"), "training.local_batch_size": 2}
    )
    first = {**HEALTH, **saved, "training.local_batch_size": 2}
    launching.train(tmp_path / "one", {**first, "training.steps": 2})
    run = launching.train(tmp_path / "one", first)
    rows = lines(tmp_path / "one")
    assert run.losses == plain.losses
    assert len(rows) == 2 * 42 * 3
    assert [row["step"] for row in rows] == [2] * 126 + [4] * 126
    assert {row["recipe"] for row in rows} == {"tensorwise"}

    launching.train(
        tmp_path / "two", {**HEALTH, "training.local_batch_size": 1, "training.steps": 2}, world=2
    )
    key = ("layer", "operand", "gemms")
    both = {tuple(str(row[k]) for k in key): row for row in lines(tmp_path / "two")}
    for row in rows[:126]:
        other = both[tuple(str(row[k]) for k in key)]
        # By step 2 the parameters differ in a float8 rounding; of half the tokens it would be off by 0.3.
        within = 0.02 if row["operand"] == "weight" else 0.1
        assert other["amax"] == pytest.approx(row["amax"], rel=within)
        assert other["flushed"] == pytest.approx(row["flushed"], abs=0.02)
        assert other["sqnr"] == pytest.approx(row["sqnr"], abs=1.0)


@pytest.mark.parametrize("world", [1, 2])
def test_an_injected_outlier_is_named_with_the_remedy(tmp_path, monkeypatch, world):
    """One input of one layer is far larger than the rest of its tensor."""
    fault = {"kind": "outlier", "step": 1, "steps": 2, "module": "layers.3.feed_forward.w2"}
    monkeypatch.setenv("OCTAVO_TEST_FAULT", json.dumps({**fault, "rank": "all"}))
    faults = {"experimental.custom_import": "tests.helpers.faults"}
    short = {"training.steps": 2, "training.local_batch_size": 2}
    run = launching.train(tmp_path, {**HEALTH, **launching.shallow(4), **short, **faults}, world=world)
    (first, *_) = [line for line in run.log.splitlines() if "WARNING - Step 2:" in line]
    assert "layers.3.feed_forward.w2 input: " in first
    assert "flushed to zero in tensorwise; rowwise gives 0" in first
    assert "--float8.layer_recipes=layers.3.feed_forward.w2=rowwise" in first
    assert "--float8.filter_fqns=output,layers.3.feed_forward.w2" in first
    assert len(run.losses) == 2
