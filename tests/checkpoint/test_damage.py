"""Damaged, forged and foreign checkpoints are named and skipped."""

import logging
import pickle
import shutil
from pathlib import Path

import pytest

from octavo.checkpoint import manifest
from octavo.checkpoint.checkpointer import Checkpointer
from octavo.checkpoint.manifest import write_synced
from octavo.checkpoint.store import find_problems
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint
from octavo.core.logging import logger
from tests.checkpoint.small import ON, build, everything, save
from tests.helpers import ranks
from tests.helpers.hostile import Touch


def _load_and_listen(folder, settings):
    """(step or error class, values or message, the log) of `load`."""
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


@pytest.fixture
def two_steps(folder):
    """Saves steps 1 and 2 into `folder`."""
    ranks.run(1, save, folder, ON, (1, 2))


DAMAGE = {
    "truncated": (_truncate, ("truncated", "not JSON", "hash differs")),
    "deleted": (Path.unlink, ("missing",)),
    "bit flipped": (_flip_a_bit, ("hash differs", "not JSON")),
}


@pytest.mark.parametrize(("world", "damage"), [*((1, damage) for damage in DAMAGE), (2, "bit flipped")])
def test_every_damaged_file_is_named_and_its_step_skipped(folder, world, damage):
    """All in one process group, with one copy of the folder per damaged file."""
    apply, words = DAMAGE[damage]
    expected = ranks.run(world, save, folder, ON, (1,))[0]
    ranks.run(world, save, folder, ON, (1, 2))
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
            if heard:  # rank 0 logs
                assert "step-2 does not verify and is skipped" in heard
                assert any(f"{victim}: {word}" in heard for word in words), heard
        assert len(answers) == len(victims)


def _load_all(folders):
    return [_load_and_listen(folder, ON) for folder in folders]


def test_if_none_verifies_the_error_names_all(two_steps, folder):
    (folder / "step-1" / "state.json").unlink()
    _flip_a_bit(folder / "step-2" / "__0_0.distcp")
    (folder / "step-7").mkdir()
    kind, message, _ = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert kind == "NoCheckpointVerifies"
    assert "step-1: state.json: missing" in message
    assert "step-2: __0_0.distcp: hash differs" in message
    assert "step-7: manifest.json: missing" in message


def test_a_requested_step_that_does_not_verify_is_an_error(two_steps, folder):
    _truncate(folder / "step-2" / "__0_0.distcp")
    kind, message, _ = ranks.run(1, _load_and_listen, folder, Checkpoint(enable=True, load_step=2))[0]
    assert kind == "DamagedCheckpoint"
    assert "load_step = 2" in message
    assert "__0_0.distcp: truncated" in message


def test_a_checkpoint_of_another_step_is_foreign(two_steps, folder):
    (folder / "step-2").rename(folder / "step-5")
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert "manifest.json: foreign: it is of step 2" in heard


def test_a_hostile_checkpoint_with_a_valid_manifest_is_skipped(two_steps, folder, sentinel):
    """Whoever can write the files can write a matching manifest."""
    hostile = pickle.dumps(Touch(sentinel))
    _forge(folder / "step-2", ".metadata", hostile)
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert "step-2/.metadata: refused: it asks for posix.system" in heard


NESTED = b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", NESTED, "not JSON"),
        ("state.json", b"{}", "state.json lacks model_only, step, world_size"),
        ("state.json", b'{"step": "x", "model_only": false, "world_size": 1}', "step is 'x', not an integer"),
    ],
)
def test_an_invalid_state_with_a_valid_manifest_is_skipped(two_steps, name, content, message, folder):
    _forge(folder / "step-2", name, content)
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert message in heard


@pytest.mark.parametrize("broken", ["nested", "bytes", "outside"])
def test_an_invalid_manifest_is_skipped(two_steps, broken, folder):
    path = folder / "step-2" / "manifest.json"
    fields = manifest.read(path.parent)
    files = {name: vars(content) for name, content in fields["files"].items()}
    if broken == "nested":
        path.write_bytes(NESTED)
    else:
        entry = files.pop("state.json")
        files |= {"state.json": {**entry, "bytes": "x"}} if broken == "bytes" else {"../state.json": entry}
        path.write_bytes(manifest._serialize({**fields, "files": files}))
    step, _, heard = ranks.run(1, _load_and_listen, folder, ON)[0]
    assert step == 1
    assert "step-2 does not verify and is skipped: manifest.json: " in heard


def _forge(path, name, content):
    fields = manifest.read(path)
    (path / name).write_bytes(content)
    files = dict(fields["files"])
    (path / name).unlink()
    files[name] = write_synced(path / name, content, fields["hash"])
    about = {key: fields[key] for key in ("world_size", "layout", "config_sha256", "versions")}
    (path / "manifest.json").write_bytes(manifest.render(fields["step"], fields["hash"], files, about))
    assert find_problems(path) == []


def _save_with_config(folder, settings):
    model, optimizer = build()
    for step in (1, 2):
        config = {"optimizer": {"lr": 0.1, "eps": step}}
        Checkpointer(settings, folder, model, optimizer).save(step, 2, {"config": config})
    return _load_and_listen(folder, settings)


def test_a_configuration_that_is_not_the_manifests_is_found_without_hashes_of_files(folder):
    settings = Checkpoint(enable=True, hash="none")
    assert ranks.run(1, _save_with_config, folder, settings)[0][0] == 2
    state = folder / "step-2" / "state.json"
    state.write_text(state.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    ((step, _, heard),) = ranks.run(1, _load_and_listen, folder, settings)
    assert step == 1
    assert "the configuration in state.json is not that of manifest.json" in heard
