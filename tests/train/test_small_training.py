"""What a run keeps in memory may shrink, and its losses stay: fused layers, a chunked loss, small moments."""

import importlib.util

import pytest

from tests.float8.graphs import layers_compile_without_code
from tests.helpers import launching

# Weights as wide as 128-blocks, so that joined ones are cut between blocks.
CHECKPOINTED = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 4}


def near(got, want, limit=1e-6):
    assert len(got) == len(want) > 0
    assert max(abs(a / b - 1) for a, b in zip(got, want, strict=True)) < limit


def losses(folder, flags, world=1):
    run = launching.train(folder, {**launching.shallow(2), **flags}, world=world)
    assert run.exit_codes == [0] * world, run.log
    return run.losses


@pytest.mark.parametrize(
    ("recipe", "starts_fused"),
    [
        ("rowwise", False),
        ("blockwise", True),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param("rowwise", True, marks=pytest.mark.slow),
        pytest.param("blockwise", False, marks=pytest.mark.slow),
    ],
)
def test_fused_layers_train_alike_and_share_checkpoints(tmp_path, recipe, starts_fused):
    """Also if one stops and the other resumes, in both directions."""
    flags = {**(launching.recipe(recipe) if recipe else {}), "float8.emulate": True} if recipe else {}
    want = losses(tmp_path / "plain", {**flags, **CHECKPOINTED})
    near(losses(tmp_path / "fused", {**flags, **CHECKPOINTED, "model.fuse": "on"}), want)
    half = {**flags, **CHECKPOINTED, "training.steps": 2}
    first, then = ({"model.fuse": "on"}, {}) if starts_fused else ({}, {"model.fuse": "on"})
    losses(tmp_path / "both", {**half, **first})
    near(losses(tmp_path / "both", {**flags, **CHECKPOINTED, **then}), want)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="high precision"),
        pytest.param(
            {**launching.recipe("rowwise"), "float8.emulate": True}, id="rowwise", marks=pytest.mark.slow
        ),
        pytest.param(
            {**launching.recipe("tensorwise"), "float8.emulate": True},
            id="tensorwise",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_compiled_fused_layers_and_a_chunked_loss_train_alike(tmp_path, monkeypatch, flags):
    """In float8 against compiled layers that are not fused, as eager ones round elsewhere; and with whole
    logits, as a sum in another order would move values over a rounding's edge.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # of this process alone
    if (
        not flags
    ):  # the graphs as they are: tests/train/test_trainer.py trains in what code is generated from them
        layers_compile_without_code(monkeypatch)
    flags = {**flags, "training.steps": 2, "training.local_batch_size": 2}
    compiled = {**flags, "training.compile": True}
    float8 = "float8.emulate" in flags
    want = losses(tmp_path / "plain", compiled if float8 else flags)
    fused = {"model.fuse": "on"} if float8 else {"model.fuse": "on", "training.loss_chunk_tokens": 48}
    near(losses(tmp_path / "fused", {**compiled, **fused}), want)


def test_fused_layers_on_two_processes_checkpointed_accumulating(tmp_path):
    """FSDP2 with a float8 gather, full recomputation, weights cast once for two microbatches."""
    flags = {
        **launching.recipe("blockwise"),
        "float8.emulate": True,
        "float8.enable_fsdp_float8_all_gather": True,
        "activation_checkpoint.mode": "full",
        "training.global_batch_size": 8,
        "training.local_batch_size": 2,
        "training.steps": 2,
    }
    want = losses(tmp_path / "plain", flags, world=2)
    near(losses(tmp_path / "fused", {**flags, "model.fuse": "on"}, world=2), want)


@pytest.mark.parametrize("world", [1, 2])
def test_a_chunked_loss_trains_alike(tmp_path, world):
    flags = {"training.local_batch_size": 4 // world, "validation.enable": True, "validation.steps": 1}
    flags |= {"validation.fraction": 0.1, "validation.freq": 4, **launching.shallow(2)}
    plain = launching.train(tmp_path / "plain", flags, world=world)
    chunked = launching.train(tmp_path / "chunked", {**flags, "training.loss_chunk_tokens": 48}, world=world)
    assert chunked.exit_codes == [0] * world, chunked.log
    near(chunked.losses, plain.losses)
    near(chunked.validation_losses, plain.validation_losses)


SMALL = [
    pytest.param({"optimizer.state_dtype": "bfloat16"}, 2, id="bfloat16 moments, two processes"),
    pytest.param({"training.dtype": "bfloat16", "optimizer.state_dtype": "bfloat16"}, 1, id="all bfloat16"),
    pytest.param(
        {"optimizer.name": "AdamW8bit"},
        1,
        id="8bit",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("bitsandbytes") is None,
            reason="bitsandbytes is not installed: pip install 'octavo[adam8bit]'",
        ),
    ),
]


@pytest.mark.parametrize(("flags", "world"), SMALL)
def test_small_moments_train_and_resume_exactly(tmp_path, flags, world):
    flags = {**flags, **CHECKPOINTED, "training.local_batch_size": 4 // world}
    whole = losses(tmp_path / "whole", flags, world=world)
    losses(tmp_path / "parts", {**flags, "training.steps": 2}, world=world)
    assert losses(tmp_path / "parts", flags, world=world) == whole
    plain = losses(tmp_path / "plain", {"training.local_batch_size": 4 // world}, world=world)
    near(whole, plain, 2e-2)
    assert whole != plain
