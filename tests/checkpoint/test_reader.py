"""The reader restores what was saved, from any layout; and runs no code of a hostile checkpoint."""

import copyreg
import io
import json
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, RefusedCheckpoint
from octavo.checkpoint.metadata import read_metadata
from octavo.checkpoint.reader import CheckpointReader, load_tensors, read_model, read_state
from tests.helpers import ranks
from tests.helpers.hostile import Touch

WEIGHTS = {
    "layer.weight": torch.arange(35.0).reshape(7, 5),
    "layer.bias": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "count": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step-1"
    ranks.run(1, save_one, folder)
    return folder


def save_one(folder):
    dcp.save({"model": WEIGHTS, "optimizer": {"layer.weight": torch.zeros(2)}}, checkpoint_id=folder)


def save_sharded(folder):
    model = torch.nn.Linear(5, 7)
    with torch.no_grad():
        model.weight.copy_(WEIGHTS["layer.weight"])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def test_model_by_plain_names(folder):
    model = read_model(folder)
    assert model.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert model[name].dtype == tensor.dtype
        assert torch.equal(model[name], tensor)


@pytest.mark.parametrize("world", [2, 3])
def test_model_from_shards(tmp_path, world):
    ranks.run(world, save_sharded, tmp_path)
    assert torch.equal(read_model(tmp_path)["weight"], WEIGHTS["layer.weight"])


def test_metadata_is_what_dcp_reads(folder):
    theirs = dcp.FileSystemReader(folder).read_metadata()
    ours = read_metadata(folder)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data == theirs.storage_data


def test_state(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 3, "tokens_seen": 4}')
    assert read_state(tmp_path) == {"step": 3, "tokens_seen": 4}
    for content, message in ((b"", "not JSON"), (b"[1]", "not JSON .a list"), (b"\xff\xfe{", "not JSON")):
        (tmp_path / "state.json").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=f"state.json: {message}"):
            read_state(tmp_path)
    for key, value in (("step", 10**30), ("step", -1), ("tokens_seen", 2**63), ("world_size", True)):
        (tmp_path / "state.json").write_text(json.dumps({key: value}))
        with pytest.raises(DamagedCheckpoint, match=f"{key} is {str(value)[:9]}.*, not an integer from 0"):
            read_state(tmp_path)
    (tmp_path / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="state.json: No such file"):
        read_state(tmp_path)


def test_hostile_metadata_runs_nothing_and_is_named(folder, sentinel):
    for hostile in (Touch(sentinel), {"a": [Touch(sentinel)]}, _metadata_with(folder, Touch(sentinel))):
        (folder / ".metadata").write_bytes(pickle.dumps(hostile))
        with pytest.raises(RefusedCheckpoint, match=r"\.metadata: refused: it asks for posix\.system"):
            read_model(folder)


def _metadata_with(folder, planner_data):
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.planner_data = planner_data
    return found


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "ops"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
        ("pathlib", "os"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_any_other_global_is_refused_by_name(folder, module, name, protocol):
    if protocol == 0:
        content = f"c{module}\n{name}\n.".encode()
    else:
        words = (b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
        content = b"\x80\x04" + b"".join(words) + b"\x93."
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(RefusedCheckpoint, match=f"asks for {module}.{name}, which"):
        read_metadata(folder)


@pytest.mark.parametrize(
    ("reduce", "asks"),
    [
        (lambda member: (type(member), (member.value,)), False),
        (lambda member: (getattr, (type(member), member.name)), True),  # Python before 3.11.4
    ],
)
def test_members_of_an_enumeration_are_read_as_every_python_pickles_them(folder, reduce, asks):
    found = pickle.loads((folder / ".metadata").read_bytes())
    written = io.BytesIO()
    pickler = pickle.Pickler(written)
    pickler.dispatch_table = {**copyreg.dispatch_table, _MEM_FORMAT_ENCODING: reduce}
    pickler.dump(found)
    assert (b"getattr" in written.getvalue()) is asks
    (folder / ".metadata").write_bytes(written.getvalue())
    assert read_model(folder).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("owner", ["torch\nSize", "torch.distributed.checkpoint.metadata\nMetadata"])
def test_getattr_gives_nothing_else(folder, owner):
    content = f"cbuiltins\ngetattr\n(c{owner}\nS'__reduce__'\ntR.".encode()
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(RefusedCheckpoint, match="asks for builtins.getattr, which"):
        read_metadata(folder)


def test_a_pickle_changes_no_class(folder):
    # BUILD with slot state sets attributes of whatever is on the stack: here of the class itself.
    content = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dS'__init__'\nS'gone'\nstb."
    (folder / ".metadata").write_bytes(content)
    before = Metadata.__init__
    with pytest.raises(DamagedCheckpoint):
        read_metadata(folder)
    assert Metadata.__init__ is before


def test_metadata_cannot_name_files_outside_the_folder(folder):
    found = pickle.loads((folder / ".metadata").read_bytes())
    for name in ("../other", "/etc/passwd", "..", ""):
        for place in found.storage_data.values():
            place.relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(found))
        with pytest.raises(DamagedCheckpoint, match="not the name of a file in the folder"):
            read_metadata(folder)


def _with_bytes_entry(folder, content):
    """Make layer.bias an entry of pickled bytes, as DCP stores objects that are not tensors."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.state_dict_metadata["model.layer.bias"] = BytesStorageMetadata()
    (index,) = [index for index in found.storage_data if index.fqn == "model.layer.bias"]
    place = found.storage_data.pop(index)
    place.relative_path, place.offset, place.length = "hostile", 0, len(content)
    found.storage_data[type(index)("model.layer.bias")] = place
    (folder / "hostile").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def _torch_save(value, path, *, legacy):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


def load_by_dcp(folder):
    tensors = {"model": {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}}
    try:
        dcp.load(tensors, storage_reader=CheckpointReader(folder))
    except BaseException as error:
        return str(error)
    return all(torch.equal(tensors["model"][name], tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_bytes_entry_runs_nothing_and_is_named(folder, sentinel, tmp_path, legacy):
    _with_bytes_entry(folder, _torch_save(Touch(sentinel), tmp_path / "x", legacy=legacy))
    message = ranks.run(1, load_by_dcp, folder)[0]
    assert "model.layer.bias: refused" in message
    assert "posix.system" in message
    with pytest.raises(RefusedCheckpoint, match="posix.system"):
        read_model(folder)


def test_harmless_bytes_entry_is_refused_too(folder, tmp_path):
    _with_bytes_entry(folder, _torch_save(WEIGHTS["layer.bias"], tmp_path / "x", legacy=False))
    with pytest.raises(RefusedCheckpoint, match="model.layer.bias.*tensors only"):
        read_model(folder)


def test_loads_into_tensors_by_dcp(folder):
    assert ranks.run(1, load_by_dcp, folder) == [True]


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_tensor_in_a_shard(folder, sentinel, tmp_path, legacy):
    found = pickle.loads((folder / ".metadata").read_bytes())
    content = _torch_save(Touch(sentinel), tmp_path / "x", legacy=legacy)
    for place in found.storage_data.values():
        place.relative_path, place.offset, place.length = "hostile", 0, len(content)
    (folder / "hostile").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(RefusedCheckpoint, match="hostile: model.*posix.system"):
        read_model(folder)
    assert "posix.system" in ranks.run(1, load_by_dcp, folder)[0]


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pt_file(sentinel, tmp_path, legacy):
    path = tmp_path / "model.pt"
    _torch_save({"weight": torch.ones(2), "x": Touch(sentinel)}, path, legacy=legacy)
    with pytest.raises(RefusedCheckpoint, match="model.pt: refused.*posix.system"):
        load_tensors(path)
    _torch_save({"weight": torch.ones(2)}, path, legacy=legacy)
    assert torch.equal(load_tensors(path)["weight"], torch.ones(2))


def test_invalid_metadata_is_named(folder):
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata: not DCP's metadata"):
        read_model(folder)
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DamagedCheckpoint, match="expected a Metadata, found a dict"):
        read_model(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata: No such file"):
        read_model(folder)


def test_a_truncated_or_missing_shard_is_named(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp: model"):
        read_model(folder)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp: model.*No such file"):
        read_model(folder)
