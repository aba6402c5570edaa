"""The trainer from end to end: losses that are right, equal where they must be equal, and readable."""

import json
import math
import re
import shutil

import pytest
import torch

from octavo.train.quantization import DEFAULT_RECIPE, recipe_name
from tests.float8.graphs import layers_compile_without_code
from tests.golden import golden
from tests.helpers import launching


def train(folder, flags, *, world=1):
    """`runs.train` with two narrow layers."""
    return launching.train(folder, {**launching.shallow(2), **flags}, world=world)


def is_sound(run, _):
    """The first loss is that of knowing nothing, and it falls."""
    assert math.log(2048) <= run.losses[0] <= math.log(2048) + 0.7
    assert run.losses[-1] < run.losses[0] - 0.25


def is_bfloat16(run, float32):
    assert run.losses != pytest.approx(float32[: len(run.losses)], rel=golden.LIMITS["bfloat16"])
    assert run.losses == pytest.approx(float32[: len(run.losses)], rel=1e-2)
    assert "High precision is bfloat16 here" in run.log


def is_float8(run, float32):
    """It follows high precision without being it."""
    assert run.losses[-1] == pytest.approx(float32[-1], rel=5e-3)
    assert run.losses != pytest.approx(float32, rel=golden.LIMITS["tensorwise"])
    assert "Swapped to Float8Linear layers: 42 of 43 linear layers; in high precision: output" in run.log
    assert re.search("Float8 training active with recipe (tensorwise|rowwise), emulated", run.log)


def tells_in_its_order(run, _):
    expected = [
        r"Starting job: ",
        r"Building llama3 debugmodel",
        r"Float8 training active with recipe rowwise, emulated",
        r"Swapped to Float8Linear layers",
        r"Model llama3 debugmodel size: 6,163,712 total parameters",
        r"Peak FLOPS used for computing MFU: \d\.\d+e\+\d\d \(measured on this CPU",
        r"Trainer is initialized with local batch size 4, global batch size 4, "
        r"gradient accumulation steps 1, sequence length 64, total steps 10 \(warmup 1\)",
        r"\[GC\] Initial GC collection",
        r"Training starts at step 1\.",
        r"step:  1  loss:  \d\.\d{4}  memory: [ \d]\d\.\d\dGiB\(\d+\.\d\d%\)  "
        r"tps: [\d,]+  tflops: \d+\.\d\d  mfu: \d+\.\d\d%\n",
        r"step: 10  loss: ",
        r"Training completed",
        r"Everything was written to .*tail .*metrics\.jsonl",
    ]
    positions = []
    for pattern in expected:
        match = re.search(pattern, run.log)
        assert match, pattern
        positions.append(match.start())
    assert positions == sorted(positions)
    assert all(line.startswith("[octavo] ") for line in run.log.splitlines() if " - INFO - " in line)


CHECKS = {
    "float32": [is_sound],
    "bfloat16": [is_bfloat16],
    "tensorwise": [is_float8],
    "rowwise": [is_float8, tells_in_its_order],
}


@pytest.mark.parametrize("name", golden.RUNS)
def test_golden_losses(name, tmp_path):
    kept = json.loads(golden.FILE.read_text())
    run = launching.train(tmp_path, {**golden.FLAGS, **golden.RUNS[name]})
    if kept["machine"] == golden.machine():
        assert run.losses == kept["losses"][name]
    else:
        assert run.losses == pytest.approx(kept["losses"][name], rel=golden.LIMITS[name])
    for check in CHECKS[name]:
        check(run, kept["losses"]["float32"])


@pytest.mark.parametrize("flags", [{}, launching.recipe("tensorwise")], ids=["float32", "tensorwise"])
def test_two_processes_train_as_one(flags, tmp_path):
    both = {**flags, "training.global_batch_size": 8}
    one = train(tmp_path / "one", both)
    two = train(tmp_path / "two", both, world=2)
    assert "gradient accumulation steps 2" in one.log
    assert "gradient accumulation steps 1" in two.log
    assert len(one.losses) == 4
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert [line["grad_norm"] for line in two.metrics] == pytest.approx(
        [line["grad_norm"] for line in one.metrics], rel=1e-4
    )
    assert one.metrics[-1]["tokens"] == two.metrics[-1]["tokens"] == 4 * 8 * 64


def test_gathering_in_float8_changes_no_bit(tmp_path):
    flags = {
        **launching.recipe("tensorwise"),
        "training.local_batch_size": 2,
        "training.global_batch_size": 8,
        "training.steps": 3,
    }
    gather = {
        "float8.enable_fsdp_float8_all_gather": "true",
        "float8.precompute_float8_dynamic_scale_for_fsdp": "true",
    }
    high = train(tmp_path / "high", flags, world=2)
    low = train(tmp_path / "low", {**flags, **gather}, world=2)
    assert len(high.losses) == 3
    assert low.losses == high.losses
    assert [line["grad_norm"] for line in low.metrics] == [line["grad_norm"] for line in high.metrics]
    assert "FSDP gathers the weights in float8" in low.log


def test_replicated_and_sharded_processes_train_as_one(tmp_path):
    flags = {"training.local_batch_size": 2, "training.global_batch_size": 8, "training.steps": 2}
    one = train(tmp_path / "one", flags)
    four = train(tmp_path / "four", {**flags, "parallelism.data_parallel_replicate_degree": 2}, world=4)
    assert four.losses == pytest.approx(one.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        ({}, 1),
        ({"training.mixed_precision_param": "bfloat16"}, 1),
        (launching.recipe("rowwise"), 1),
        (launching.recipe("rowwise"), 2),
        ({"checkpoint.async_mode": "async"}, 2),
    ],
    ids=["float32", "bfloat16", "rowwise", "rowwise on two", "async on two"],
)
def test_resumed_run_goes_on_bit_for_bit(flags, world, tmp_path):
    flags = {**flags, "checkpoint.enable": "true", "checkpoint.interval": 2}
    whole = train(tmp_path, flags, world=world)
    assert len(whole.losses) == 4
    shutil.rmtree(tmp_path / "checkpoint" / "step-4")
    resumed = train(tmp_path, flags, world=world)
    assert "resumed step 2, " in resumed.log
    assert "Training starts at step 3." in resumed.log
    assert "step:  2" not in resumed.log
    assert resumed.losses == whole.losses
    assert [line["grad_norm"] for line in resumed.metrics] == [line["grad_norm"] for line in whole.metrics]
    assert [line["tokens"] for line in resumed.metrics] == [line["tokens"] for line in whole.metrics]


def test_longer_run_goes_on_from_a_finished_one(tmp_path):
    flags = {"checkpoint.enable": "true"}
    whole = train(tmp_path / "whole", {**flags, "training.steps": 4})
    train(tmp_path / "parts", {**flags, "training.steps": 2})
    parts = train(tmp_path / "parts", {**flags, "training.steps": 4})
    assert parts.losses == whole.losses
    assert "Changed since" not in parts.log


def test_finished_run_has_nothing_left_to_do(tmp_path):
    flags = {"checkpoint.enable": "true", "training.steps": 2}
    whole = train(tmp_path, flags)
    again = train(tmp_path, flags)
    assert again.exit_codes == [0]
    assert "All 2 steps of this run are done" in again.log
    assert again.losses == whole.losses


def test_checkpoint_of_two_processes_goes_on_with_one(tmp_path):
    flags = {"checkpoint.enable": "true", "checkpoint.interval": 2, "training.global_batch_size": 8}
    whole = train(tmp_path, flags, world=2)
    shutil.rmtree(tmp_path / "checkpoint" / "step-4")
    resumed = train(tmp_path, flags, world=1)
    assert "Training starts at step 3." in resumed.log
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit(mode, tmp_path):
    flags = {**launching.recipe("rowwise"), "training.steps": 2}
    plain = train(tmp_path / "plain", flags)
    again = train(tmp_path / "again", {**flags, "activation_checkpoint.mode": mode})
    assert again.losses == plain.losses
    assert [line["grad_norm"] for line in again.metrics] == [line["grad_norm"] for line in plain.metrics]


def test_casting_weights_once_changes_no_bit(tmp_path):
    flags = {**launching.recipe("rowwise"), "training.global_batch_size": 8, "training.steps": 2}
    once = train(tmp_path / "once", flags)
    each = train(tmp_path / "each", {**flags, "float8.cast_weights_once": "false"})
    assert once.losses == each.losses
    assert [line["grad_norm"] for line in once.metrics] == [line["grad_norm"] for line in each.metrics]


@pytest.mark.parametrize(
    ("precision", "code"),
    [
        pytest.param({}, True, id="high precision"),
        pytest.param(
            launching.recipe("rowwise"), False, id="rowwise, graphs"
        ),  # half a minute of generating code
        pytest.param(launching.recipe("rowwise"), True, id="rowwise", marks=pytest.mark.slow),
    ],
)
def test_compiled_run_follows_the_eager_one(tmp_path, monkeypatch, precision, code):
    if not code:
        layers_compile_without_code(monkeypatch)
    flags = {**precision, "training.steps": 3, "activation_checkpoint.mode": "selective"}
    eager = train(tmp_path / "eager", flags)
    compiled = train(tmp_path / "compiled", {**flags, "compile.enable": "true"}, world=1)
    assert compiled.losses == pytest.approx(eager.losses, rel=2e-3)


def test_deterministic_run_repeats(tmp_path):
    flags = {"training.deterministic": "true", "training.steps": 2, "training.seed": 7}
    first, second = (train(tmp_path / name, flags).losses for name in "ab")
    assert first == second
    assert first != train(tmp_path / "c", {**flags, "training.seed": 8}).losses


def test_model_from_outside_the_package(tmp_path):
    flags = {
        "experimental.custom_import": "tests.models.custom_model",
        "model.name": "bigram",
        "model.flavor": "small",
        "optimizer.lr": 0.05,
        **launching.FLOAT8,
        "float8.filter_fqns": "head",
    }
    run = train(tmp_path, flags, world=2)
    assert "Swapped to Float8Linear layers: 1 of 2 linear layers; in high precision: head" in run.log
    assert run.losses[-1] < run.losses[0] - 0.1


def test_traces_are_written(tmp_path):
    run = train(
        tmp_path, {"profiling.enable_profiling": "true", "profiling.profile_freq": 2, "training.steps": 2}
    )
    (trace,) = (tmp_path / "profile_traces").rglob("*.json")
    assert trace.parent.name == "iteration_2"
    assert any("mm" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])
    assert "Saved trace" in run.log


def test_run_record_says_what_really_ran(tmp_path):
    train(tmp_path, {"training.steps": 2, **launching.recipe("rowwise")})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["precision"] == "rowwise"
    assert record["high_precision_dtype"] in ("float32", "bfloat16")
    assert record["torch"] == torch.__version__
    assert record["config"]["training"]["seq_len"] == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**launching.FLOAT8, "float8.filter_fqns": "output,wz"}, "'wz' matches no linear layer"),
        (
            {**launching.FLOAT8, "float8.filter_fqns": "attention,feed_forward,output"},
            "leaves none of the 15 linear",
        ),
        ({"training.seq_len": 10**7}, "seq_len"),
    ],
)
def test_what_only_the_model_or_the_data_can_refuse(flags, message, tmp_path):
    run = train(tmp_path, flags)
    assert run.exit_codes == [2]
    assert message in run.log
    assert "Traceback" not in run.log


def test_recipe_in_force():
    from octavo.config.schema import Float8

    assert recipe_name([], Float8(recipe_name="rowwise")) is None
    assert recipe_name(["float8"], Float8()) == DEFAULT_RECIPE
    assert recipe_name(["float8"], Float8(recipe_name="rowwise")) == "rowwise"
