"""Save and load give back every bit, on the ranks that saved and on others; what cannot be loaded is
named.
"""

import json
import logging
import os
import pickle
import random
import re
import shutil
import tempfile
import threading
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from octavo.checkpoint import manifest, points, saving
from octavo.checkpoint.checkpointer import Checkpointer
from octavo.checkpoint.errors import SavesFailed
from octavo.checkpoint.hashing import write_synced
from octavo.checkpoint.store import Store, problems
from octavo.checkpoint.store import published as saved_steps
from octavo.components.logging import logger
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint
from octavo.distributed import mesh
from tests import ranks


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoint"


def build(width=6, sharded=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width, bias=False), nn.Linear(width, 3))
    if dist.get_world_size() > 1 if sharded is None else sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 5), step + 1.0)).square().sum().backward()
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).tolist()


def everything(model, optimizer):
    """Parameters and optimizer state as plain lists."""
    return [[whole(p), *(whole(v) for v in optimizer.state[p].values())] for p in model.parameters()]


def _save(folder, settings, steps=(3,)):
    model, optimizer = build()
    checkpointer = Checkpointer(settings, folder, model, optimizer)
    for step in steps:
        train(model, optimizer)
        checkpointer.save(step, max(steps), {"note": f"after {step}"})
    checkpointer.wait()
    return everything(model, optimizer)


def _load(folder, settings, width=6, last_step=None):
    model, optimizer = build(width)
    try:
        state = Checkpointer(settings, folder, model, optimizer).load(last_step)
    except ConfigError as error:
        return str(error)
    return state, everything(model, optimizer) if state else None


ON = Checkpoint(enable=True)


@pytest.mark.parametrize(("saved", "loaded"), [(1, 1), (2, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_load_gives_back_every_bit(folder, saved, loaded, mode):
    expected = ranks.run(saved, _save, folder, Checkpoint(enable=True, async_mode=mode))[0]
    for state, values in ranks.run(loaded, _load, folder, ON):
        assert state["step"] == 3
        assert state["note"] == "after 3"
        assert values == expected


def test_newest_step_unless_another_is_asked_for(folder):
    ranks.run(1, _save, folder, ON, (2, 9, 10))
    assert saved_steps(folder) == [2, 9, 10]
    (newest, _), (second, _) = (
        ranks.run(1, _load, folder, settings)[0] for settings in (ON, Checkpoint(enable=True, load_step=2))
    )
    assert (newest["step"], second["step"]) == (10, 2)
    message = ranks.run(1, _load, folder, Checkpoint(enable=True, load_step=7))[0]
    assert "load_step = 7" in message
    assert "[2, 9, 10]" in message


def test_only_the_newest_are_kept(folder):
    ranks.run(2, _save, folder, Checkpoint(enable=True, keep_latest_k=2), (1, 2, 3, 4))
    assert saved_steps(folder) == [3, 4]
    assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-4"]


def test_keep_latest_k_of_zero_keeps_all(folder):
    ranks.run(1, _save, folder, Checkpoint(enable=True, keep_latest_k=0), (1, 2, 3))
    assert saved_steps(folder) == [1, 2, 3]


def test_an_unfinished_save_is_not_a_checkpoint(folder):
    ranks.run(1, _save, folder, ON, (1, 2))
    (folder / "step-2").rename(folder / "step-2.tmp-1f2e")
    (folder / "step-2.tmp-1f2e" / "manifest.json").unlink()
    assert saved_steps(folder) == [1]
    assert ranks.run(1, _load, folder, ON)[0][0]["step"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["step-1"]


def test_nothing_to_load(folder):
    assert ranks.run(1, _load, folder, ON) == [(None, None)]
    ranks.run(1, _save, folder, ON)
    assert ranks.run(1, _load, folder, Checkpoint(enable=False)) == [(None, None)]


def test_another_model_is_refused_by_name_and_shape(folder):
    ranks.run(1, _save, folder, ON)
    message = ranks.run(1, _load, folder, ON, 7)[0]
    assert "0.weight is (6, 5) in it and (7, 5) in the model" in message


def _load_and_listen(folder, settings):
    """What `load` gives, or the class of its error; and all that was logged or raised."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    model, optimizer = build()
    try:
        state = Checkpointer(settings, folder, model, optimizer).load()
    except ConfigError as error:
        return type(error).__name__, str(error), "\n".join(heard)
    return state["step"], everything(model, optimizer), "\n".join(heard)


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b1000
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "truncated": (_truncate, ("truncated", "no JSON", "hash differs")),
    "deleted": (Path.unlink, ("missing",)),
    "bit flipped": (_flip_a_bit, ("hash differs", "no JSON")),
}


@pytest.mark.parametrize(("world", "damage"), [*((1, damage) for damage in DAMAGE), (2, "bit flipped")])
def test_every_damaged_file_is_named_and_walked_back_from(folder, world, damage):
    """All in one group: files are damaged and mended between loads."""
    apply, words = DAMAGE[damage]
    expected = ranks.run(world, _save, folder, ON, (1,))[0]
    ranks.run(world, _save, folder, ON, (1, 2))
    shutil.rmtree(folder / "step-1.aside-0")
    victims = sorted(path.name for path in (folder / "step-2").iterdir())
    assert {"manifest.json", "state.json", ".metadata", "__0_0.distcp"} <= set(victims)
    copies = {}
    for victim in victims:
        copies[victim] = folder.parent / victim / "checkpoint"
        shutil.copytree(folder, copies[victim])
        apply(copies[victim] / "step-2" / victim)
    for answers in ranks.run(world, _load_all, list(copies.values())):
        for victim, (step, values, heard) in zip(victims, answers, strict=True):
            assert step == 1
            assert values == expected
            if heard:  # rank 0 tells
                assert "step-2 does not verify and is passed over" in heard
                assert any(f"{victim}: {word}" in heard for word in words), heard
        assert len(answers) == len(victims)


def _load_all(folders):
    return [_load_and_listen(folder, ON) for folder in folders]


def test_none_that_verifies_is_an_error_that_names_all(folder):
    ranks.run(1, _save, folder, ON, (1, 2))
    (folder / "step-1" / "state.json").unlink()
    _flip_a_bit(folder / "step-2" / "__0_0.distcp")
    (folder / "step-7").mkdir()
    kind, message, _ = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert kind == "NoCheckpointVerifies"
    assert "step-1: state.json: missing" in message
    assert "step-2: __0_0.distcp: hash differs" in message
    assert "step-7: manifest.json: missing" in message


def test_a_step_asked_for_that_does_not_verify_is_an_error(folder):
    ranks.run(1, _save, folder, ON, (1, 2))
    _truncate(folder / "step-2" / "__0_0.distcp")
    kind, message, _ = ranks.run(1, _load_and_listen, folder, Checkpoint(enable=True, load_step=2))[0]
    assert kind == "DamagedCheckpoint"
    assert "load_step = 2" in message
    assert "__0_0.distcp: truncated" in message


def test_a_checkpoint_of_another_step_is_foreign(folder):
    ranks.run(1, _save, folder, ON, (1, 2))
    (folder / "step-2").rename(folder / "step-5")
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert "manifest.json: foreign: it is of step 2" in heard


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_checkpoint_with_a_right_manifest_is_passed_over(folder, tmp_path):
    """Whoever can write the files can write a manifest that fits."""
    ranks.run(1, _save, folder, ON, (1, 2))
    hostile = pickle.dumps(Touch(tmp_path / "sentinel"))
    _forge(folder / "step-2", ".metadata", hostile)
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert "step-2/.metadata: refused: it asks for posix.system" in heard
    assert not (tmp_path / "sentinel").exists()


NESTED = b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("state.json", NESTED, "no JSON"),
        ("state.json", b"{}", "state.json lacks model_only, step, world_size"),
        ("state.json", b'{"step": "x", "model_only": false, "world_size": 1}', "step is 'x', and no int"),
    ],
)
def test_a_senseless_state_with_a_right_manifest_is_passed_over(name, content, told, folder):
    ranks.run(1, _save, folder, ON, (1, 2))
    _forge(folder / "step-2", name, content)
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert told in heard


@pytest.mark.parametrize("broken", ["nested", "bytes", "outside"])
def test_a_senseless_manifest_is_passed_over(broken, folder):
    ranks.run(1, _save, folder, ON, (1, 2))
    path = folder / "step-2" / "manifest.json"
    fields = manifest.read(path.parent)
    files = {name: vars(content) for name, content in fields["files"].items()}
    if broken == "nested":
        path.write_bytes(NESTED)
    else:
        entry = files.pop("state.json")
        files |= {"state.json": {**entry, "bytes": "x"}} if broken == "bytes" else {"../state.json": entry}
        path.write_bytes(manifest._written({**fields, "files": files}))
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert "step-2 does not verify and is passed over: manifest.json: " in heard


def test_what_stands_in_the_way_is_set_aside_or_the_save_failed(folder, monkeypatch):
    """Never is a save told as done that is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step-3").write_text("a file")
    ranks.run(1, _save, folder, ON)
    assert saved_steps(folder) == [3]
    assert (folder / "step-3.aside-0").read_text() == "a file"
    monkeypatch.setattr(Store, "_set_aside", _busy)
    (message,) = ranks.run(1, _fails_to_save, folder)
    assert "step-3 was not saved" in message
    assert problems(folder / "step-3") == []


def _busy(store, step):
    raise OSError(16, "Device or resource busy")


def _fails_to_save(folder):
    try:
        _save(folder, ON)
    except ConfigError as error:
        return str(error)


def _forge(path, name, content):
    fields = manifest.read(path)
    (path / name).write_bytes(content)
    files = dict(fields["files"])
    (path / name).unlink()
    files[name] = write_synced(path / name, content, fields["hash"])
    about = {key: fields[key] for key in ("world_size", "layout", "config_sha256", "versions")}
    (path / "manifest.json").write_bytes(manifest.render(fields["step"], fields["hash"], files, about))
    assert problems(path) == []


@pytest.mark.parametrize("world", [1, 2])
def test_random_numbers_go_on(folder, world):
    drawn = ranks.run(world, _save_and_draw, folder)
    assert ranks.run(world, _load_and_draw, folder) == [(numbers, {}) for numbers in drawn]
    assert len({tuple(numbers) for numbers in drawn}) == world
    for numbers, not_exact in ranks.run(3 - world, _load_and_draw, folder):
        assert numbers not in drawn
        assert not_exact == {"RNG": f"{world} processes then, {3 - world} now"}


# NumPy's global generator is the one that a run has to carry over.
# ruff: noqa: NPY002
def _seed(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    random.gauss(0, 1)  # leaves a second number behind
    numpy.random.normal()


def _draw():
    return [
        torch.rand(()).item(),
        torch.randn(()).item(),
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.normal()),
        float(numpy.random.rand()),
    ]


def _save_and_draw(folder):
    model, optimizer = build()
    train(model, optimizer)
    checkpointer = Checkpointer(ON, folder, model, optimizer)
    _seed(dist.get_rank())
    checkpointer.save(1, 1, {})
    return _draw()


def _load_and_draw(folder):
    model, optimizer = build()
    checkpointer = Checkpointer(ON, folder, model, optimizer)
    _seed(100 + dist.get_rank())
    not_exact = checkpointer.load()["not_exact"]
    return _draw(), not_exact


def test_last_save_of_the_model_alone(folder):
    settings = Checkpoint(enable=True, last_save_model_only=True)
    ranks.run(1, _save, folder, settings, (1, 2))
    assert json.loads((folder / "step-2" / "state.json").read_text())["model_only"]
    assert "model only" in ranks.run(1, _load, folder, settings)[0]
    assert "model only" in ranks.run(1, _load, folder, settings, 6, 3)[0]  # a run that is to go on
    assert ranks.run(1, _load, folder, settings, 6, 2)[0][0]["step"] == 2  # and one that is over
    assert ranks.run(1, _load, folder, Checkpoint(enable=True, load_step=1))[0][0]["step"] == 1


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


def test_a_slow_disk_is_no_hang(folder):
    """Training's timeout, which finds hung ranks in seconds, is not that of a save."""
    default, *ours = ranks.run(1, _timeouts, folder)[0]
    assert default == 7
    assert min(ours) >= 3600


class _Elsewhere(saving.Writer):
    """Writes into a folder of the same name on this rank's own disk."""

    def __init__(self, partial, algorithm):
        super().__init__(partial.parents[1] / f"disk{dist.get_rank()}" / partial.name, algorithm)


def _cut(path):
    os.truncate(path, path.stat().st_size - 1)


def _save_unseen(folder, how):
    saving._SEEN_WITHIN = 0.5
    model, optimizer = build()
    checkpointer = Checkpointer(ON, folder, model, optimizer)
    checkpointer.save(1, 3, {})
    if dist.get_rank() == 1:
        if how == "elsewhere":
            saving.Writer = _Elsewhere
        else:
            action = {"late": _appears_later, "cut": _cut}[how]
            points.hook = lambda name: (
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
    ("how", "told"),
    [
        ("elsewhere", "__1_0.distcp: No such file or directory"),
        ("cut", r"__1_0.distcp: \d+ bytes, of \d+"),
        ("late", None),
    ],
)
def test_what_rank_0_does_not_see_is_not_published(folder, how, told):
    """A rank whose files are on a disk of its own, or in a cache that is not written back yet."""
    errors = ranks.run(2, _save_unseen, folder, how)
    if told is None:
        assert errors == [None, None]
        assert saved_steps(folder) == [1, 2, 3]
        return
    for error in errors:
        assert re.search(
            "step-3 was not saved: files of rank 1 are not visible to rank 0: job.dump_folder must be on a "
            rf"file system that all machines share \(.*{told}\)",
            error,
        )
    assert saved_steps(folder) == [1]
    assert os.listdir(folder) == ["step-1"]
