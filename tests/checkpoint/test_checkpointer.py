"""Save and load restore every bit, on any number of ranks; a failed save is reported."""

import json
import os
import re
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from octavo.checkpoint import failpoints, saving
from octavo.checkpoint.checkpoint_errors import SavesFailed
from octavo.checkpoint.checkpointer import Checkpointer
from octavo.checkpoint.store import Store, find_problems
from octavo.checkpoint.store import published_steps as saved_steps
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint
from octavo.distributed import mesh
from tests.checkpoint.small import ON, build, load, save
from tests.helpers import ranks


@pytest.mark.parametrize(("saved", "loaded"), [(1, 1), (2, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_load_restores_every_bit(folder, saved, loaded, mode):
    expected = ranks.run(saved, save, folder, Checkpoint(enable=True, async_mode=mode))[0]
    for state, values in ranks.run(loaded, load, folder, ON):
        assert state["step"] == 3
        assert state["note"] == "after 3"
        assert values == expected


def test_the_newest_step_unless_another_is_requested(folder):
    ranks.run(1, save, folder, ON, (2, 9, 10))
    assert saved_steps(folder) == [2, 9, 10]
    (newest, _), (second, _) = (
        ranks.run(1, load, folder, settings)[0] for settings in (ON, Checkpoint(enable=True, load_step=2))
    )
    assert (newest["step"], second["step"]) == (10, 2)
    message = ranks.run(1, load, folder, Checkpoint(enable=True, load_step=7))[0]
    assert "load_step = 7" in message
    assert "[2, 9, 10]" in message


@pytest.mark.parametrize(("world", "keep", "kept"), [(2, 2, [3, 4]), (1, 0, [1, 2, 3, 4])])
def test_keep_latest_k(folder, world, keep, kept):
    ranks.run(world, save, folder, Checkpoint(enable=True, keep_latest_k=keep), (1, 2, 3, 4))
    assert saved_steps(folder) == kept
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step}" for step in kept]


def test_an_unfinished_save_is_not_a_checkpoint(folder):
    ranks.run(1, save, folder, ON, (1, 2))
    (folder / "step-2").rename(folder / "step-2.tmp-1f2e")
    (folder / "step-2.tmp-1f2e" / "manifest.json").unlink()
    assert saved_steps(folder) == [1]
    assert ranks.run(1, load, folder, ON)[0][0]["step"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["step-1"]


def test_nothing_to_load(folder):
    assert ranks.run(1, load, folder, ON) == [(None, None)]
    ranks.run(1, save, folder, ON)
    assert ranks.run(1, load, folder, Checkpoint(enable=False)) == [(None, None)]


def test_another_model_is_refused_by_name_and_shape(folder):
    ranks.run(1, save, folder, ON)
    message = ranks.run(1, load, folder, ON, 7)[0]
    assert "0.weight is (6, 5) in it and (7, 5) in the model" in message


def test_a_file_in_the_way_is_set_aside_or_the_save_fails(folder, monkeypatch):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step-3").write_text("a file")
    ranks.run(1, save, folder, ON)
    assert saved_steps(folder) == [3]
    assert (folder / "step-3.aside-0").read_text() == "a file"
    monkeypatch.setattr(Store, "_set_aside", _busy)
    (message,) = ranks.run(1, _fails_to_save, folder)
    assert "step-3 was not saved" in message
    assert find_problems(folder / "step-3") == []


def _busy(store, step):
    raise OSError(16, "Device or resource busy")


def _fails_to_save(folder):
    try:
        save(folder, ON)
    except ConfigError as error:
        return str(error)


def test_last_save_of_the_model_only(folder):
    settings = Checkpoint(enable=True, last_save_model_only=True)
    ranks.run(1, save, folder, settings, (1, 2))
    assert json.loads((folder / "step-2" / "state.json").read_text())["model_only"]
    assert "only the model" in ranks.run(1, load, folder, settings)[0]
    assert "only the model" in ranks.run(1, load, folder, settings, 6, 3)[0]  # a run with steps left
    assert ranks.run(1, load, folder, settings, 6, 2)[0][0]["step"] == 2  # a run that is over
    assert ranks.run(1, load, folder, Checkpoint(enable=True, load_step=1))[0][0]["step"] == 1


def test_saves_at_the_interval_and_at_the_end():
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Checkpoint(enable=True, interval=4), Path(folder), nn.Linear(1, 1), None)
        assert [step for step in range(1, 11) if checkpointer.due(step, 10)] == [4, 8, 10]
        off = Checkpointer(Checkpoint(enable=False, interval=4), Path(folder), nn.Linear(1, 1), None)
        assert not any(off.due(step, 10) for step in range(1, 11))


def _timeouts(folder):
    model, optimizer = build()
    checkpointer = Checkpointer(ON, folder, model, optimizer)
    mesh.set_timeout(7)
    groups = (dist.group.WORLD, checkpointer._control, checkpointer._writing)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_a_slow_disk_is_not_a_hang(folder):
    """Saves do not use training's timeout, which detects hung ranks in seconds."""
    default, *ours = ranks.run(1, _timeouts, folder)[0]
    assert default == 7
    assert min(ours) >= 3600


class _Elsewhere(saving.HashingWriter):
    """Writes into a folder of the same name on a disk of this rank."""

    def __init__(self, partial, algorithm):
        super().__init__(partial.parents[1] / f"disk{dist.get_rank()}" / partial.name, algorithm)


def _cut(path):
    os.truncate(path, path.stat().st_size - 1)


def _save_unseen(folder, how):
    saving._VISIBLE_WITHIN = 0.5
    model, optimizer = build()
    checkpointer = Checkpointer(ON, folder, model, optimizer)
    checkpointer.save(1, 3, {})
    if dist.get_rank() == 1:
        if how == "elsewhere":
            saving.HashingWriter = _Elsewhere
        else:
            action = {"late": _appears_later, "cut": _cut}[how]
            failpoints.hook = lambda name: (
                name == "after shard" and action(next(folder.glob("step-*.tmp-*")) / "__1_0.distcp")
            )
    checkpointer.save(2, 3, {})
    try:
        checkpointer.save(3, 3, {})
    except SavesFailed as error:
        return str(error)
    return None


def _appears_later(path):
    hidden = path.rename(path.with_name("hidden"))
    threading.Timer(0.3, hidden.rename, [path]).start()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("elsewhere", "__1_0.distcp: No such file or directory"),
        ("cut", r"__1_0.distcp: \d+ bytes, of \d+"),
        ("late", None),
    ],
)
def test_files_that_rank_0_does_not_see_are_not_published(folder, how, message):
    """A rank's files are on its own disk, or in a cache that is not written back yet."""
    errors = ranks.run(2, _save_unseen, folder, how)
    if message is None:
        assert errors == [None, None]
        assert saved_steps(folder) == [1, 2, 3]
        return
    for error in errors:
        assert re.search(
            "step-3 was not saved: files of rank 1 are not visible to rank 0: job.dump_folder must be on a "
            rf"file system that all machines share \(.*{message}\)",
            error,
        )
    assert saved_steps(folder) == [1]
    assert os.listdir(folder) == ["step-1"]
