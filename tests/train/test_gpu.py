"""The trainer on a GPU: float8 on its hardware, compiled, mixed precision, and the nccl group of one."""

import json
import subprocess
import sys

import pytest

from tests.helpers import launching

pytestmark = pytest.mark.gpu

# Widths that hardware takes, and enough steps that a wrong gradient shows.
FLAGS = {
    **launching.TINY,
    "training.mixed_precision_param": "auto",  # bfloat16 on every GPU
    "training.seq_len": 256,
    "training.local_batch_size": 8,
    "training.steps": 20,
}


def train(folder, flags):
    """Losses and log of a run in a process of its own: a forked one could not use CUDA."""
    merged = {"job.dump_folder": folder, "training.dataset": launching.small_corpus(), **FLAGS, **flags}
    argv = [f"--{key}={value}" for key, value in merged.items()]
    done = subprocess.run(
        [sys.executable, "-m", "octavo.train", *argv], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done.stderr


def losses(metrics):
    return [line["loss"] for line in metrics]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return train(tmp_path_factory.mktemp("bf16"), {})


def test_high_precision_is_bfloat16(baseline):
    metrics, log = baseline
    assert "High precision is bfloat16 here" in log
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[-1]["memory_gib"] > 0


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_float8_follows_bfloat16(recipe, compiled, baseline, tmp_path):
    flags = launching.recipe(recipe) | ({"compile.enable": "true"} if compiled else {})
    metrics, log = train(tmp_path, flags)
    assert f"Float8 training active with recipe {recipe}" in log
    assert losses(metrics)[-1] == pytest.approx(losses(baseline[0])[-1], rel=5e-3)
    assert losses(metrics) != losses(baseline[0])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_keeps_the_losses(mode, baseline, tmp_path):
    metrics, _ = train(tmp_path, {"activation_checkpoint.mode": mode})
    assert losses(metrics) == pytest.approx(losses(baseline[0]), rel=1e-3)


def test_deterministic_run_repeats(tmp_path):
    flags = {"training.deterministic": "true", "training.steps": 5, **launching.recipe("rowwise")}
    assert losses(train(tmp_path / "a", flags)[0]) == losses(train(tmp_path / "b", flags)[0])


def test_memory_snapshots_and_traces(tmp_path):
    flags = {
        "profiling.enable_memory_snapshot": "true",
        "profiling.enable_profiling": "true",
        "profiling.profile_freq": 2,
        "training.steps": 2,
    }
    train(tmp_path, flags)
    assert list((tmp_path / "memory_snapshot").rglob("*.pickle"))
    assert list((tmp_path / "profile_traces").rglob("*.json"))
