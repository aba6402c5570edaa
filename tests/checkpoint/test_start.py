"""The start of a run: from its own or another run's checkpoint or from a seed checkpoint; its log line."""

import json
import shutil

import pytest

from octavo.checkpoint.loading import resume_message
from octavo.checkpoint.store import published_steps
from tests.checkpoint.crashes import FLAGS, final_hash
from tests.helpers import launching

SHORT = {**FLAGS, "training.steps": 6, "checkpoint.keep_latest_k": 0}


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A run of six steps."""
    folder = tmp_path_factory.mktemp("six")
    return folder, launching.train(folder, SHORT)


def test_the_resume_line_lists_what_is_exact():
    assert resume_message(3, 96, {}) == "resumed step 3, tokens 96, data position exact, RNG exact"
    message = resume_message(
        3, 96, {"data position": None, "RNG": "2 processes then, 1 now", "optimizer": "excluded"}
    )
    assert message == (
        "resumed step 3, tokens 96, data position exact, RNG not exact (2 processes then, 1 now), "
        "optimizer not exact (excluded)"
    )


def test_another_number_of_processes_is_reported(six, tmp_path):
    shutil.copytree(six[0] / "checkpoint" / "step-3", tmp_path / "checkpoint" / "step-3")
    run = launching.train(
        tmp_path, {**SHORT, "training.global_batch_size": 2, "training.local_batch_size": 1}, world=2
    )
    line = "resumed step 3, tokens 96, data position exact, RNG not exact (1 processes then, 2 now)"
    assert line in run.log
    assert run.losses == pytest.approx(six[1].losses[3:], rel=1e-5)


def test_no_checkpoint_that_verifies_ends_with_3(six, tmp_path):
    shutil.copytree(six[0] / "checkpoint", tmp_path / "checkpoint")
    for step in (3, 6):
        (tmp_path / "checkpoint" / f"step-{step}" / "state.json").unlink()
    run = launching.train(tmp_path, SHORT)
    assert run.exit_codes == [3]
    assert run.losses == []
    assert "step-3: state.json: missing" in run.log
    assert "step-6: state.json: missing" in run.log
    assert "Traceback" not in run.log


def test_a_run_resumes_from_before_the_damage_and_ends_the_same(six, tmp_path):
    shutil.copytree(six[0] / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "step-6" / "__0_0.distcp").write_bytes(b"")
    run = launching.train(tmp_path, SHORT)
    assert "step-6 does not verify and is skipped: __0_0.distcp: truncated" in run.log
    assert "resumed step 3, " in run.log
    assert run.losses == six[1].losses[3:]
    assert final_hash(tmp_path) == final_hash(six[0])
    assert "step-6.aside-0" in {path.name for path in (tmp_path / "checkpoint").iterdir()}


def test_continuing_another_runs_checkpoint(six, tmp_path):
    flags = {**SHORT, "checkpoint.initial_load_path": six[0] / "checkpoint" / "step-3"}
    whole = launching.train(tmp_path / "whole", {**flags, "checkpoint.initial_load_model_only": "false"})
    assert whole.losses == six[1].losses[3:]
    assert final_hash(tmp_path / "whole") == final_hash(six[0])
    weights = launching.train(tmp_path / "weights", flags)
    assert len(weights.losses) == 6
    assert weights.losses[0] not in six[1].losses


@pytest.mark.parametrize(
    ("excluded", "losses", "message"),
    [
        ("optimizer", 3, "optimizer not exact (excluded)"),
        ("dataloader", 3, "data position not exact (it starts anew)"),
        ("optimizer,dataloader,train_state", 6, "resumed step 0, tokens 0"),
    ],
)
def test_exclude_from_loading(six, tmp_path, excluded, losses, message):
    path = six[0] / "checkpoint" / "step-3"
    flags = {
        **SHORT,
        "checkpoint.initial_load_path": path,
        "checkpoint.initial_load_model_only": "false",
        "checkpoint.exclude_from_loading": excluded,
    }
    run = launching.train(tmp_path, flags)
    assert message in run.log
    assert len(run.losses) == losses
    assert run.losses != six[1].losses[-losses:]
    if losses == 6:  # the same as loading only the weights
        weights = {**SHORT, "checkpoint.initial_load_path": path}
        assert run.losses == launching.train(tmp_path / "weights", weights).losses


def test_excluding_from_a_resumed_run_is_refused(tmp_path):
    run = launching.train(tmp_path, {**SHORT, "checkpoint.exclude_from_loading": "optimizer"})
    assert run.exit_codes == [2]
    assert "exclude_from_loading" in run.log
    assert "would have no effect: a run that resumes loads everything" in run.log


def test_a_run_from_a_seed_checkpoint_equals_one_without(six, tmp_path):
    seed = launching.train(tmp_path, {**SHORT, "checkpoint.create_seed_checkpoint": "true"})
    assert seed.exit_codes == [0]
    assert seed.losses == []
    assert published_steps(tmp_path / "checkpoint") == [0]
    assert json.loads((tmp_path / "checkpoint" / "step-0" / "state.json").read_text())["step"] == 0
    again = launching.train(tmp_path, {**SHORT, "checkpoint.create_seed_checkpoint": "true"})
    assert again.exit_codes == [2]
    assert "holds checkpoints" in again.log
    run = launching.train(tmp_path, SHORT)
    assert "resumed step 0, tokens 0, data position exact, RNG exact" in run.log
    assert run.losses == six[1].losses
    assert final_hash(tmp_path) == final_hash(six[0])


def test_load_only_saves_nothing(six, tmp_path):
    shutil.copytree(six[0] / "checkpoint" / "step-3", tmp_path / "checkpoint" / "step-3")
    flags = {key: value for key, value in SHORT.items() if key in FLAGS and "interval" not in key}
    del flags["checkpoint.keep_latest_k"]
    run = launching.train(tmp_path, {**flags, "checkpoint.load_only": "true"})
    assert run.losses == six[1].losses[3:]
    assert published_steps(tmp_path / "checkpoint") == [3]


def test_time_for_saves_is_in_the_metrics_and_the_log(six):
    run = six[1]
    lost = [line["saving_seconds"] for line in run.metrics]
    assert [step for step, value in enumerate(lost, 1) if value > 0] == [4]  # logged with the next step
    assert run.log.count("training paused for") == 2
