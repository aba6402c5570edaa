"""Training with the previous step's scales: close to tensorwise, resumed bit for bit, on any layout."""

from __future__ import annotations

import pytest

from tests import runs

RECIPE = runs.recipe("tensorwise_previous_step")
STEPS = {"training.steps": 6}
SAVES = {"checkpoint.enable": True, "checkpoint.interval": 3}
# A few thousand elements a layer: their maxima jump more than those of a real batch.
BOUND = {"float8.max_saturated": 0.05}


def test_the_loss_is_tensorwises_and_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole = runs.train(tmp_path / "whole", {**RECIPE, **STEPS, **SAVES, **BOUND})
    tensorwise = runs.train(tmp_path / "tensorwise", {**runs.recipe("tensorwise"), **STEPS})
    assert whole.losses[0] == tensorwise.losses[0]  # just in time
    assert whole.losses[2:] != tensorwise.losses[2:]
    for loss, other in zip(whole.losses, tensorwise.losses, strict=True):
        assert abs(loss - other) < 1e-2
    assert whole.metrics[0]["float8_saturated"] == 0.0
    assert any(line["float8_saturated"] > 0 for line in whole.metrics[1:])
    assert whole.metrics[-1]["float8_fallbacks"] == 0

    again = {**RECIPE, **SAVES, **BOUND, "lr_scheduler.decay_ratio": 0}
    folder = tmp_path / "again"
    runs.train(folder, {**again, "training.steps": 3})
    resumed = runs.train(folder, {**again, **STEPS})
    assert resumed.losses[-3:] == whole.losses[-3:]
    assert "not exact" not in resumed.log


def test_too_much_saturation_is_told_and_leads_to_steps_just_in_time(tmp_path):
    run = runs.train(tmp_path, {**RECIPE, **STEPS, "float8.max_saturated": 0.0})
    assert "lay beyond the previous step's maximum, more than float8.max_saturated = 0" in run.log
    assert run.metrics[-1]["float8_fallbacks"] >= 1


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, {"training.local_batch_size": 2}),
        (2, {"parallelism.tensor_parallel_degree": 2}),
        (2, {"parallelism.pipeline_parallel_degree": 2}),
        (1, {"training.local_batch_size": 2, "training.global_batch_size": 4}),
        (1, {"activation_checkpoint.mode": "full"}),
    ],
    ids=["data", "tensor", "pipeline", "accumulation", "checkpointing"],
)
def test_scales_do_not_depend_on_the_layout(world, flags, tmp_path):
    one = runs.train(tmp_path / "one", {**RECIPE, **BOUND, "training.steps": 3})
    other = runs.train(tmp_path / "other", {**RECIPE, **BOUND, "training.steps": 3, **flags}, world=world)
    # The first step is cast just in time, by the maxima of each rank's own tokens, as tensorwise is.
    for loss, wanted in zip(other.losses, one.losses, strict=True):
        assert abs(loss - wanted) < 3e-3
    shares = [(line["float8_saturated"], line["float8_fallbacks"]) for line in other.metrics]
    assert shares[1][0] == pytest.approx(one.metrics[1]["float8_saturated"], rel=0.5, abs=2e-5)
