"""Training with the previous step's scales: close to tensorwise, resumed bit for bit, on any layout."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers import launching

RECIPE = {**launching.shallow(4), **launching.recipe("tensorwise_previous_step")}
STEPS = {"training.steps": 6}
SAVES = {"checkpoint.enable": True, "checkpoint.interval": 3}
# A few thousand elements a layer: their maxima jump more than those of a real batch.
BOUND = {"float8.max_saturated": 0.05}
PIPELINE, SCHEDULE = "parallelism.pipeline_parallel_degree", "parallelism.pipeline_parallel_schedule"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps on one process, and their folder."""
    folder = tmp_path_factory.mktemp("whole")
    return launching.train(folder, {**RECIPE, **STEPS, **SAVES, **BOUND}), folder


def test_the_loss_is_tensorwises(whole, tmp_path):
    run, _ = whole
    tensorwise = launching.train(tmp_path, {**launching.shallow(4), **launching.recipe("tensorwise")})
    assert run.losses[0] == tensorwise.losses[0]  # just in time
    assert run.losses[2:4] != tensorwise.losses[2:4]
    for loss, other in zip(run.losses[:4], tensorwise.losses, strict=True):
        assert abs(loss - other) < 1e-2
    assert run.metrics[0]["float8_saturated"] == 0.0
    assert any(line["float8_saturated"] > 0 for line in run.metrics[1:])
    assert run.metrics[-1]["float8_fallbacks"] == 0


def test_a_resumed_run_goes_on_bit_for_bit(whole, tmp_path):
    run, folder = whole
    shutil.copytree(folder / "checkpoint" / "step-3", tmp_path / "checkpoint" / "step-3")
    resumed = launching.train(tmp_path, {**RECIPE, **STEPS, **SAVES, **BOUND})
    assert resumed.losses == run.losses[3:]
    assert "not exact" not in resumed.log


def test_too_much_saturation_is_told_and_leads_to_steps_just_in_time(tmp_path):
    run = launching.train(tmp_path, {**RECIPE, "float8.max_saturated": 0.0})
    assert "lay beyond the previous step's maximum, more than float8.max_saturated = 0" in run.log
    assert run.metrics[-1]["float8_fallbacks"] >= 1


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, {"training.local_batch_size": 2, "float8.enable_fsdp_float8_all_gather": True}),
        (2, {PIPELINE: 2, SCHEDULE: "GPipe"}),
        pytest.param(2, {"parallelism.tensor_parallel_degree": 2}, marks=pytest.mark.slow),
        pytest.param(
            1, {"training.local_batch_size": 2, "training.global_batch_size": 4}, marks=pytest.mark.slow
        ),
        pytest.param(1, {"activation_checkpoint.mode": "full"}, marks=pytest.mark.slow),
    ],
    ids=["data, gathered in float8", "GPipe", "tensor", "accumulation", "checkpointing"],
)
def test_scales_do_not_depend_on_the_layout(world, flags, whole, tmp_path):
    one, _ = whole
    other = launching.train(tmp_path, {**RECIPE, **BOUND, "training.steps": 3, **flags}, world=world)
    # The first step is cast just in time, by the maxima of each rank's own tokens, as tensorwise is.
    for loss, wanted in zip(other.losses, one.losses[:3], strict=True):
        assert abs(loss - wanted) < 3e-3
    assert other.metrics[1]["float8_fallbacks"] == 0
    assert other.metrics[1]["float8_saturated"] == pytest.approx(
        one.metrics[1]["float8_saturated"], rel=0.5, abs=2e-5
    )
