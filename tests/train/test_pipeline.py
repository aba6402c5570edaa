"""What a run does besides steps works in a pipeline, whichever process has the last stage."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint.reader import read_model
from tests.helpers import launching

P = "parallelism.pipeline_parallel_"
PP = {f"{P}degree": 2}
LOOPED = {**PP, f"{P}schedule": "InterleavedZeroBubble"}
NARROW = launching.shallow(4)
SAVES = {**NARROW, "checkpoint.enable": "true", "checkpoint.interval": 2, "metrics.log_grad_norm": True}
FAULTS = {**NARROW, "experimental.custom_import": "tests.helpers.faults"}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def tell(run):
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in run.metrics]


def test_a_run_that_is_stopped_goes_on_bit_for_bit_and_exports_its_model(tmp_path, monkeypatch):
    flags = {**SAVES, **LOOPED, **launching.recipe("rowwise"), "checkpoint.last_save_in_hf": True}
    whole = launching.train(tmp_path / "whole", flags, world=2)
    assert whole.exit_codes == [0, 0]
    assert len(whole.losses) == 4
    line = re.search(r"step:  4  loss: *([\d.]+)  grad_norm: *([\d.]+)", whole.log)
    assert line is not None  # on the console of rank 0, which has the first stage
    assert float(line[1]) == pytest.approx(whole.losses[3], abs=1e-4)

    fault = {"kind": "signal", "step": 3, "rank": 1, "signal": "SIGTERM"}
    monkeypatch.setenv("OCTAVO_TEST_FAULT", json.dumps(fault))
    stopped = launching.train(tmp_path / "stopped", {**flags, **FAULTS}, world=2)
    assert stopped.exit_codes == [75, 75]
    monkeypatch.delenv("OCTAVO_TEST_FAULT")
    resumed = launching.train(tmp_path / "stopped", {**flags, **FAULTS}, world=2)
    assert tell(resumed) == tell(whole)
    last = "checkpoint/step-4"
    same(read_model(tmp_path / "stopped" / last), read_model(tmp_path / "whole" / last))

    # one process resumes from it and exports the same model
    monkeypatch.undo()
    alone = {"checkpoint.initial_load_path": tmp_path / "whole" / last, "optimizer.lr": 1e-30}
    more = {"training.steps": 2, "optimizer.weight_decay": 0, "optimizer.eps": 1e3}
    again = launching.train(
        tmp_path / "alone", {**SAVES, **alone, **more, "checkpoint.last_save_in_hf": True}
    )
    assert again.exit_codes == [0]
    exported = [next((tmp_path / run / "checkpoint").glob("*-hf")) for run in ("whole", "alone")]
    same(*(load_file(folder / "model.safetensors") for folder in exported))


def test_a_pipeline_starts_from_a_seed_checkpoint_and_from_an_export(tmp_path):
    seed = {**SAVES, "checkpoint.create_seed_checkpoint": True}
    assert launching.train(tmp_path / "run", seed).exit_codes == [0]
    begun = launching.train(tmp_path / "run", {**SAVES, **PP, "checkpoint.last_save_in_hf": True}, world=2)
    fresh = launching.train(tmp_path / "fresh", {**SAVES, **PP}, world=2)
    assert begun.exit_codes == [0, 0]
    assert tell(begun) == tell(fresh)
    start = {
        **NARROW,
        "checkpoint.initial_load_path": tmp_path / "run" / "checkpoint" / "step-4-hf",
        "checkpoint.initial_load_in_hf": True,
        "training.steps": 2,
    }
    one, two = (
        launching.train(tmp_path / name, {**start, **degrees}, world=world)
        for name, world, degrees in (("one", 1, {}), ("two", 2, LOOPED))
    )
    assert two.losses == pytest.approx(one.losses, rel=1e-6)
    assert two.losses[0] != pytest.approx(fresh.losses[0], rel=1e-3)


# Layer 3 is in stage 1 of two, layer 1 in stage 1 of four: each of them with process 1.
@pytest.mark.parametrize(
    ("kind", "flags", "module", "named"),
    [
        ("activation", LOOPED, "layers.1.feed_forward.w2", "the output of {} in forward"),
        ("gradient", PP, "layers.3.feed_forward", "the gradient of {}.w2's output in backward"),
        ("weight", PP, "layers.3.feed_forward.w2", "the weight {}.weight, before the step"),
    ],
)
def test_a_bad_number_is_named_with_its_layer(kind, flags, module, named, tmp_path, monkeypatch):
    fault = {"kind": kind, "step": 2, "rank": 1, "module": module}
    monkeypatch.setenv("OCTAVO_TEST_FAULT", json.dumps(fault))
    run = launching.train(tmp_path, {**FAULTS, **flags}, world=2)
    assert run.exit_codes == [4, 4]
    assert f"the first number that is not finite is in {named.format(module)}" in run.log
    assert "Traceback" not in run.log


def test_a_step_that_is_skipped_and_one_that_is_rewound(tmp_path, monkeypatch):
    fault = {"kind": "gradient", "step": 3, "rank": 1, "module": "layers.3.feed_forward"}
    monkeypatch.setenv("OCTAVO_TEST_FAULT", json.dumps(fault))
    flags = {**SAVES, **FAULTS, **PP, "checkpoint.interval": 1}
    skipping = launching.train(tmp_path / "skip", {**flags, "fault_tolerance.non_finite": "skip"}, world=2)
    assert skipping.exit_codes == [0, 0]
    saved = tmp_path / "skip" / "checkpoint"
    same(read_model(saved / "step-2"), read_model(saved / "step-3"))
    assert [line["skipped_steps"] for line in skipping.metrics] == [0, 0, 1, 1]
    monkeypatch.setenv("OCTAVO_TEST_FAULT", json.dumps({**fault, "once": True}))
    rewinding = launching.train(
        tmp_path / "rewind", {**flags, "fault_tolerance.non_finite": "rewind"}, world=2
    )
    assert rewinding.exit_codes == [0, 0]
    assert rewinding.metrics[-1]["rewinds"] == 1


def test_tied_embeddings_are_one_error(tmp_path):
    run = launching.train(tmp_path, {**PP, "model.flavor": "1B"}, world=2)
    assert run.exit_codes == [2, 2]
    assert "this model's output projection is its embedding (tied)" in run.log
    assert "Traceback" not in run.log
    assert "Building" not in run.log


def test_more_stages_than_layers_are_one_error(tmp_path):
    run = launching.train(
        tmp_path, {**LOOPED, f"{P}layers_per_stage": 1, f"{P}first_stage_less_layers": 3}, world=2
    )
    assert run.exit_codes == [2, 2]
    assert "10 stages, which need a layer, the embedding or the head" in run.log
    assert "Building" not in run.log
