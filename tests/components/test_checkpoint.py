"""Save and load give back every bit, on the ranks that saved and on others; what cannot be loaded is
named.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from octavo.components.checkpoint import Checkpointer, saved_steps
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint
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


def _load(folder, settings, width=6):
    model, optimizer = build(width)
    try:
        state = Checkpointer(settings, folder, model, optimizer).load()
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
    ranks.run(1, _save, folder, ON, (2, 10, 9))
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
    (folder / "step-2").rename(folder / "step-2.tmp")
    (folder / "step-5").mkdir()
    assert saved_steps(folder) == [1]
    assert ranks.run(1, _load, folder, ON)[0][0]["step"] == 1


def test_nothing_to_load(folder):
    assert ranks.run(1, _load, folder, ON) == [(None, None)]
    ranks.run(1, _save, folder, ON)
    assert ranks.run(1, _load, folder, Checkpoint(enable=False)) == [(None, None)]


def test_another_model_is_refused_by_name_and_shape(folder):
    ranks.run(1, _save, folder, ON)
    message = ranks.run(1, _load, folder, ON, 7)[0]
    assert "0.weight is (6, 5) in it and (7, 5) in the model" in message


@pytest.mark.parametrize("victim", ["state.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["emptied", "removed"])
def test_damaged_checkpoint_is_named_with_the_remedy(folder, victim, damage):
    ranks.run(1, _save, folder, ON, (1, 2))
    file = folder / "step-2" / victim
    if damage == "removed":
        file.unlink()
        if victim == "state.json":  # without it the folder is no checkpoint, and the one before is the newest
            assert ranks.run(1, _load, folder, ON)[0][0]["step"] == 1
            return
    else:
        file.write_bytes(b"")
    message = ranks.run(1, _load, folder, ON)[0]
    assert "step-2 cannot be read" in message
    assert "of [1]" in message


def test_last_save_of_the_model_alone(folder):
    settings = Checkpoint(enable=True, last_save_model_only=True)
    ranks.run(1, _save, folder, settings, (1, 2))
    assert json.loads((folder / "step-2" / "state.json").read_text())["model_only"]
    assert "model only" in ranks.run(1, _load, folder, settings)[0]
    assert ranks.run(1, _load, folder, Checkpoint(enable=True, load_step=1))[0][0]["step"] == 1


def test_saves_at_the_interval_and_at_the_end():
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Checkpoint(enable=True, interval=4), Path(folder), nn.Linear(1, 1), None)
        assert [step for step in range(1, 11) if checkpointer.due(step, 10)] == [4, 8, 10]
        off = Checkpointer(Checkpoint(enable=False, interval=4), Path(folder), nn.Linear(1, 1), None)
        assert not any(off.due(step, 10) for step in range(1, 11))
