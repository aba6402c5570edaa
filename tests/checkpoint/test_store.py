"""Published checkpoints are complete, damage is found, and enough verified checkpoints are kept."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.checkpoint import NoCheckpointVerifies, failpoints, latest, manifest
from octavo.checkpoint.manifest import BLOCK, FileDigest, HashingFile, verify_files, write_synced
from octavo.checkpoint.store import Store, find_problems, published_steps
from octavo.config import ConfigError


def write(store, step, content=b"weights"):
    partial = store.create_partial(step)
    files = {
        "state.json": write_synced(partial / "state.json", b"{}", store.algorithm),
        "__0_0.distcp": write_synced(partial / "__0_0.distcp", content * 9, store.algorithm),
    }
    notes = store.publish(partial, step, files, {"world_size": 1})
    return notes, store.delete_old()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, keep=2, algorithm="crc32")


@pytest.fixture
def reached(monkeypatch):
    seen = []
    monkeypatch.setattr(failpoints, "hook", seen.append)
    return seen


def test_failpoints_in_order(store, reached):
    write(store, 1)
    assert reached == ["before manifest", "after manifest", "before rename", "after rename"]


def test_at_every_instant_one_verifies(tmp_path, monkeypatch):
    """Checked at each failpoint of six saves; after every third, its checkpoint is damaged."""
    store = Store(tmp_path, keep=2, algorithm="crc32")
    write(store, 1)
    seen = []

    def look(name):
        seen.append((name, latest(tmp_path).name))
        for path in tmp_path.iterdir():  # published checkpoints are complete unless damaged
            if path.name.startswith("step-") and "." not in path.name and path.name != damaged:
                assert find_problems(path) == []

    monkeypatch.setattr(failpoints, "hook", look)
    damaged = ""
    for step in range(2, 8):
        write(store, step)
        if step % 3 == 0:
            damaged = f"step-{step}"
            (tmp_path / damaged / "state.json").write_text("{ }")
            store = Store(tmp_path, keep=2, algorithm="crc32")  # a restarted run, which has verified nothing
    assert {name for name, _ in seen} >= {"before rename", "after rename", "during purge"}
    assert latest(tmp_path).name == "step-7"


def test_only_those_that_verify_are_counted(tmp_path):
    store = Store(tmp_path, keep=0, algorithm="crc32")
    for step in (1, 2, 3):
        write(store, step)
    (tmp_path / "step-2" / "__0_0.distcp").write_bytes(b"weights" * 8 + b"weighty")
    store = Store(tmp_path, keep=3, algorithm="crc32")
    assert write(store, 4)[1] == []
    assert published_steps(tmp_path) == [1, 2, 3, 4]
    assert write(store, 5)[1] == [2, 1]
    assert published_steps(tmp_path) == [3, 4, 5]


def test_a_published_checkpoint_is_never_overwritten(store, tmp_path):
    write(store, 1, b"first")
    write(store, 2, b"second")
    notes, _ = write(store, 2, b"another")
    assert len(notes) == 1
    assert "step-2.aside-0" in notes[0]
    assert (tmp_path / "step-2.aside-0" / "__0_0.distcp").read_bytes() == b"second" * 9
    assert (tmp_path / "step-2" / "__0_0.distcp").read_bytes() == b"another" * 9
    write(store, 2)
    assert names(tmp_path) == ["step-1", "step-2", "step-2.aside-0", "step-2.aside-1"]


def test_later_steps_of_an_abandoned_run_are_set_aside(store, tmp_path):
    for step in (1, 2, 3):
        write(store, step)
    write(store, 2)
    assert names(tmp_path) == ["step-2", "step-2.aside-0", "step-3.aside-0"]
    assert latest(tmp_path).name == "step-2"


def test_only_unfinished_folders_are_removed(store, tmp_path):
    write(store, 1)
    for name in ("step-2.tmp-1f2e3d4c", "step-2.tmp", "step-3.aside-0", "notes", "step-x.tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "step-5.tmp-file").write_text("a user's file")
    (tmp_path / "step-6.tmp-link").symlink_to(tmp_path / "notes")
    assert sorted(store.remove_unfinished()) == ["step-2.tmp", "step-2.tmp-1f2e3d4c"]
    left = ["notes", "step-1", "step-3.aside-0", "step-5.tmp-file", "step-6.tmp-link", "step-x.tmp-1"]
    assert names(tmp_path) == left
    assert (tmp_path / "notes" / "file").exists()


def test_latest_names_all_problems(store, tmp_path):
    with pytest.raises(ConfigError, match="contains no checkpoint"):
        latest(tmp_path)
    for step in (1, 2):
        write(store, step)
    assert latest(tmp_path).name == "step-2"
    (tmp_path / "step-2" / "state.json").unlink()
    assert latest(tmp_path).name == "step-1"
    (tmp_path / "step-1" / "manifest.json").write_text("{}")
    with pytest.raises(NoCheckpointVerifies) as caught:
        latest(tmp_path)
    assert "step-2: state.json: missing" in str(caught.value)
    assert "step-1: manifest.json: not a manifest of octavo" in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "__0_0.distcp"])
@pytest.mark.parametrize("algorithm", ["crc32", "sha256"])
def test_every_bit_of_every_file_matters(tmp_path, name, algorithm):
    write(Store(tmp_path, keep=2, algorithm=algorithm), 1)
    path = tmp_path / "step-1" / name
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 1 if len(content) < 200 else 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        (problem,) = find_problems(tmp_path / "step-1")
        assert problem.startswith(f"{name}: "), (bit, problem)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        (problem,) = find_problems(tmp_path / "step-1")
        assert problem.startswith(f"{name}: ")
    path.write_bytes(content)
    assert find_problems(tmp_path / "step-1") == []


def test_without_hashes_sizes_are_compared(tmp_path):
    store = Store(tmp_path, keep=2, algorithm="none")
    write(store, 1)
    path = tmp_path / "step-1" / "__0_0.distcp"
    path.write_bytes(b"x" * path.stat().st_size)
    assert find_problems(tmp_path / "step-1") == []
    path.write_bytes(b"x")
    assert find_problems(tmp_path / "step-1") == ["__0_0.distcp: truncated: 1 bytes, 63 were written"]


def test_a_foreign_manifest_is_refused(store, tmp_path):
    write(store, 1)
    path = tmp_path / "step-1" / "manifest.json"
    for wrong in ({"format": "octavo checkpoint 9"}, {"hash": "md5"}, {"files": 3}, {"step": 2}):
        fields = {**manifest.read(tmp_path / "step-1"), "files": {}, **wrong}
        path.write_bytes(manifest._serialize(fields))
        (problem,) = find_problems(tmp_path / "step-1")
        assert problem.startswith("manifest.json: foreign"), problem
        shutil.rmtree(tmp_path / "step-1")
        write(store, 1)


@pytest.mark.parametrize("algorithm", ["crc32", "sha256"])
@settings(max_examples=10)
@given(pieces=st.lists(st.integers(0, BLOCK + 9), max_size=3), flipped=st.integers(0, 2**62))
def test_blocks_do_not_depend_on_how_a_file_is_written(tmp_path_factory, algorithm, pieces, flipped):
    folder = tmp_path_factory.mktemp("blocks")
    total = sum(pieces)
    content = bytes(range(251)) * (total // 251 + 1)
    with HashingFile(folder / "a", algorithm) as file:
        start = 0
        for piece in pieces:
            assert file.write(content[start : start + piece]) == piece
            start += piece
        assert file.tell() == total
        found = file.digest()
    assert found == write_synced(folder / "b", content[:total], algorithm)
    assert len(found.blocks) == -(-total // BLOCK)
    for threads in (1, 3):
        assert verify_files(folder, {"a": found, "b": found}, algorithm, threads=threads) == []
    if total:
        at = flipped % total
        with (folder / "b").open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1]))
        (problem,) = verify_files(folder, {"a": found, "b": found}, algorithm)
        assert problem == f"b: hash differs, within 16 MiB from byte {at // BLOCK * BLOCK:,} on"
    shutil.rmtree(folder)


def test_missing_and_too_long(tmp_path):
    content = write_synced(tmp_path / "a", b"four", "crc32")
    assert verify_files(tmp_path, {"a": content, "b": content}, "crc32") == ["b: missing"]
    (tmp_path / "a").write_bytes(b"fours")
    assert verify_files(tmp_path, {"a": content}, "crc32") == ["a: too long: 5 bytes, 4 were written"]
    assert verify_files(tmp_path, {"a": FileDigest(5, ())}, "none") == []
