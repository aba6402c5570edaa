"""Runs that are killed at a failpoint or at a random time."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

from octavo.checkpoint import failpoints, latest
from octavo.checkpoint.reader import read_tensors
from tests.helpers import launching

# A small custom model: 0.3 MiB per checkpoint, 10 ms per step.
FLAGS = {
    "experimental.custom_import": "tests.models.custom_model",
    "model.name": "bigram",
    "model.flavor": "small",
    "training.seq_len": 16,
    "training.local_batch_size": 2,
    "training.steps": 26,
    "checkpoint.enable": "true",
    "checkpoint.interval": 3,
    "checkpoint.keep_latest_k": 2,
}

_killed = multiprocessing.get_context("fork").Value("i", 0)


def kill_at(point: str, *, visit: int, rank: int | None = None) -> Any:
    """A failpoint hook: SIGKILL when a process reaches `point` for the `visit`-th time; None: on any rank."""
    visits = 0
    lock = threading.Lock()

    def hook(name: str) -> None:
        nonlocal visits
        if name != point or (rank is not None and os.environ.get("RANK") != str(rank)):
            return
        with lock:
            visits += 1
            if visits == visit:
                _killed.value = 1
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def crashes(folder: Path, flags: dict[str, Any], world: int, hook: Any) -> bool:
    """Train with a failpoint hook; whether a process was killed."""
    failpoints.hook, _killed.value = hook, 0
    try:
        launching.train(folder, flags, world=world)
    except AssertionError:
        if not _killed.value:  # another failure
            raise
        return True
    finally:
        failpoints.hook = None
    return False


def final_hash(folder: Path) -> str:
    """A hash of the newest checkpoint's parameters and optimizer state."""
    found = latest(folder / "checkpoint")
    digest = hashlib.sha256(found.name.encode())
    for prefix in ("model.", "optimizer."):
        for name, tensor in sorted(read_tensors(found, prefix).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def crashes_after(
    folder: Path, flags: dict[str, Any], world: int, seconds: float, victim: int | None
) -> bool:
    """Train, and SIGKILL one process (None: all) `seconds` after the start; whether it was still running."""
    killed = []
    over = threading.Event()

    def kill() -> None:
        while not (folder / "run.json").exists() and not over.is_set():
            over.wait(0.005)
        if over.wait(seconds):
            return
        children = sorted(multiprocessing.active_children(), key=lambda child: child.pid or 0)
        for child in children if victim is None else children[victim : victim + 1]:
            killed.append(child.pid)
            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        launching.train(folder, flags, world=world)
    except AssertionError:
        assert killed
        return True
    finally:
        over.set()
        killer.join()
    return False


def last_step(folder: Path) -> int:
    """The last step that a run logged."""
    file = folder / "metrics.jsonl"
    steps = [0]
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):  # the line that was being written
            steps.append(json.loads(line)["step"])
    return max(steps)
