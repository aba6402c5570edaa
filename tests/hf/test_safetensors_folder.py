"""Safetensors folders: any number of files returns the same tensors, and bad files are named."""

import itertools
import json
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.config import ConfigError
from octavo.hf import safetensors_folder

TENSORS = {f"t{i}": torch.arange(10.0 + i) for i in range(5)}


def write(folder, most=10**6):
    folder.mkdir()
    plan = safetensors_folder.split_into_shards(
        {name: tensor.numel() * 4 for name, tensor in TENSORS.items()}, most
    )
    safetensors_folder.write_shards(folder, plan, TENSORS.__getitem__)
    return folder


@pytest.mark.parametrize(("most", "count"), [(10**6, 1), (100, 3), (1, 5)])
def test_written_and_read_back(tmp_path, most, count):
    folder = write(tmp_path / "model", most)
    stored = safetensors_folder.find_tensors(folder)
    assert len(list(folder.glob("*.safetensors"))) == count
    assert {name: one.shape for name, one in stored.items()} == {
        n: tuple(t.shape) for n, t in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        assert torch.equal(safetensors_folder.read_tensor(stored[name], name), tensor)
    index = json.loads((folder / safetensors_folder.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()


def test_files_have_the_mode_of_the_umask(tmp_path):
    folder = write(tmp_path / "model")
    (tmp_path / "plain").touch()
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {plain}


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_shards_keep_the_order_and_the_limit(sizes, most):
    named = {str(i): size for i, size in enumerate(sizes)}
    shards = safetensors_folder.split_into_shards(named, most)
    assert [name for names in shards for name in names] == list(named)
    for names in shards:
        assert len(names) == 1 or sum(named[name] for name in names) <= most
    for names, after in itertools.pairwise(shards):
        assert sum(named[name] for name in names) + named[after[0]] > most


def test_a_missing_or_damaged_file_is_named(tmp_path):
    folder = write(tmp_path / "model", 1)
    victim = folder / "model-00002-of-00005.safetensors"
    content = victim.read_bytes()
    for damage in (content[:5], content[:-1], b"\xff" * len(content), b""):
        victim.write_bytes(damage)
        with pytest.raises(
            ConfigError, match=r"model-00002-of-00005.safetensors is damaged or not a safetensors file"
        ):
            safetensors_folder.find_tensors(folder)
    victim.unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00005.safetensors is missing"):
        safetensors_folder.find_tensors(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", 3])
def test_an_index_cannot_name_files_outside_the_folder(tmp_path, name):
    folder = write(tmp_path / "model")
    (folder / safetensors_folder.INDEX).write_text(json.dumps({"weight_map": {"t0": name}}))
    with pytest.raises(ConfigError, match="is not the name of a file in the folder"):
        safetensors_folder.find_tensors(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "null"])
def test_an_invalid_index_is_named(tmp_path, text):
    folder = write(tmp_path / "model")
    (folder / safetensors_folder.INDEX).write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json: not an index of safetensors files"):
        safetensors_folder.find_tensors(folder)


def test_the_same_tensor_in_two_files_is_refused(tmp_path):
    folder = write(tmp_path / "model")
    (folder / safetensors_folder.INDEX).unlink()
    (folder / "copy.safetensors").write_bytes((folder / safetensors_folder.SINGLE).read_bytes())
    with pytest.raises(ConfigError, match="t0 is in copy.safetensors and in model.safetensors"):
        safetensors_folder.find_tensors(folder)


def test_quantised_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2, dtype=torch.float8_e5m2)}, tmp_path / safetensors_folder.SINGLE)
    with pytest.raises(ConfigError, match="w is stored as F8_E5M2"):
        safetensors_folder.find_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("100", 100), ("7kb", 7000)],
)
def test_sizes(text, size):
    assert safetensors_folder.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "0", "GB", "1e3", "0.1B"])
def test_invalid_sizes(text):
    with pytest.raises(ConfigError, match="expected a size such as 5GB"):
        safetensors_folder.parse_size(text)
