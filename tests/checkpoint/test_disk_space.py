"""A full disk costs a checkpoint, not the run; too many failures in a row end the run."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch

from octavo.checkpoint import failpoints, latest, saving
from octavo.checkpoint.store import published_steps
from octavo.core.format import format_bytes
from tests.checkpoint.crashes import FLAGS
from tests.helpers import launching

MANY = {**FLAGS, "training.steps": 12, "checkpoint.interval": 2, "checkpoint.keep_latest_k": 0}


@pytest.fixture
def mounted(tmp_path):
    """Mounts a tmpfs of a number of MiB as the folder of checkpoints."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    done = []

    def mount(mebibytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "octavo-test", str(folder)]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            pytest.skip(f"no tmpfs may be mounted here: {found.stderr.strip()}")
        done.append(folder)
        return folder

    yield mount
    for folder in done:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_tmpfs_of_3_mib(mounted, world, tmp_path):
    """A checkpoint takes 3.3 MiB, so the save fails before it writes anything."""
    folder = mounted(3)
    flags = {**MANY, "training.steps": 8, "checkpoint.max_failed_saves": 3}
    run = launching.train(tmp_path, flags, world=world)
    assert run.exit_codes == [1] * world
    assert len(run.losses) == 6
    assert "step-2 was not saved: no space: it needs 3." in run.log
    assert "has 3.0 MiB free. Training continues; 2 more in a row end the run" in run.log
    assert "step-6 was not saved" in run.log
    assert "That is failure 3 in a row (checkpoint.max_failed_saves)" in run.log
    assert os.listdir(folder) == []


def test_what_fits_stays(mounted, tmp_path):
    folder = mounted(8)
    run = launching.train(tmp_path, {**MANY, "training.steps": 8, "checkpoint.max_failed_saves": 2})
    assert run.exit_codes == [1]
    assert published_steps(folder) == [2, 4]
    assert latest(folder).name == "step-4"
    assert "step-6 was not saved: no space" in run.log
    assert sorted(os.listdir(folder)) == ["step-2", "step-4"]


def _fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**14))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_disk_fills_up_during_a_save(mounted, mode, tmp_path, monkeypatch):
    """Another file fills the disk during the save; when it is gone, the next save succeeds."""
    folder = mounted(12)
    ballast = folder / "ballast"
    visits = []

    def hook(name):
        if name == "during write":
            visits.append(name)
            if len(visits) == 3:  # two files per save
                _fill(ballast)
        if name == "before write":
            ballast.unlink(missing_ok=True)

    monkeypatch.setattr(failpoints, "hook", hook)
    flags = {**MANY, "training.steps": 6, "checkpoint.async_mode": mode, "checkpoint.keep_latest_k": 2}
    run = launching.train(tmp_path, flags)
    assert run.exit_codes == [0]
    assert len(run.losses) == 6
    assert "step-4 was not saved: no space: it needs 3." in run.log
    assert sorted(os.listdir(folder)) == ["step-2", "step-6"]
    assert latest(folder).name == "step-6"


@pytest.mark.parametrize("world", [1, 2])
def test_a_file_that_may_not_grow_is_a_full_disk(world, tmp_path, monkeypatch):
    """One rank exceeds RLIMIT_FSIZE, and all ranks report a full disk."""

    def hook(name):
        if name == "during write" and os.environ["RANK"] == str(world - 1):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
        if name == "before write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    monkeypatch.setattr(failpoints, "hook", hook)
    flags = {**MANY, "training.steps": 4, "checkpoint.max_failed_saves": 2}
    run = launching.train(tmp_path, flags, world=world)
    assert run.exit_codes == [1] * world
    assert "step-2 was not saved: no space: it needs" in run.log
    assert "step-4 was not saved: no space" in run.log
    assert "It was the last save" in run.log
    assert os.listdir(tmp_path / "checkpoint") == []


def test_space_of_old_checkpoints_does_not_count_as_free(tmp_path, monkeypatch):
    """Two checkpoints exist, one of which would be deleted, and half of one is free."""
    run = launching.train(tmp_path, {**FLAGS, "training.steps": 6, "checkpoint.keep_latest_k": 2})
    assert run.exit_codes == [0]
    (found,) = {
        sum(p.stat().st_size for p in s.iterdir()) // 2**19 for s in (tmp_path / "checkpoint").iterdir()
    }
    usage = shutil.disk_usage(tmp_path)
    half = (found + 1) * 2**18
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=half))
    run = launching.train(tmp_path, {**FLAGS, "training.steps": 8})
    assert run.exit_codes == [1]
    assert f"has {format_bytes(half)} free" in run.log
    assert published_steps(tmp_path / "checkpoint") == [3, 6]


def test_estimate_is_enough_and_not_twice_as_much(tmp_path):
    launching.train(tmp_path, {**FLAGS, "training.steps": 3}, world=2)
    path = latest(tmp_path / "checkpoint")
    taken = sum(file.stat().st_size for file in path.iterdir())
    from octavo.checkpoint.reader import read_tensors

    tensors = {prefix: read_tensors(path, f"{prefix}.") for prefix in ("model", "optimizer", "rng")}
    assert taken <= saving.estimate_bytes(tensors, 2) < 2 * taken


def test_a_failure_names_the_rank_and_the_error(tmp_path):
    from torch.distributed.checkpoint.api import CheckpointException

    error = CheckpointException("x", {1: (RuntimeError("broken"), None)})
    assert saving.describe_failure(error, tmp_path, 5) == "rank 1: RuntimeError: broken"
    full = OSError(28, "No space left on device")
    assert saving.describe_failure(full, tmp_path, 2**20).startswith("no space: it needs 1.0 MiB")
    wrapped = CheckpointException("x", {0: (ValueError("y"), None), 1: (full, None)})
    assert saving.describe_failure(wrapped, tmp_path, 5).startswith("no space: it needs 5 bytes")
    with pytest.raises(KeyboardInterrupt):
        saving.describe_failure(CheckpointException("x", {0: (KeyboardInterrupt(), None)}), tmp_path, 5)


def test_estimate_counts_nested_tensors():
    tensors = {"a": {"b": torch.zeros(1000)}, "c": torch.zeros(2, dtype=torch.int64)}
    assert saving.estimate_bytes(tensors, 3) == 4000 + 16 + 2 * 3 * 4096
    assert saving.estimate_bytes(SimpleNamespace(), 1) == 0
