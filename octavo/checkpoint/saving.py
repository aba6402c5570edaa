"""One save, from tensors to a published folder, on every rank together.

Each rank writes its shards; rank 0 makes the folder, looks whether it sees what the others have written,
writes the state and the manifest, and publishes. Every rank learns the same outcome. A failure is an outcome,
not an exception: training goes on after it.
"""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from octavo.checkpoint import disk_space, failpoints, manifest
from octavo.checkpoint.hashing import Content, write_synced
from octavo.checkpoint.hashing_writer import HashingWriter
from octavo.checkpoint.reader import STATE
from octavo.checkpoint.store import Store

_T = TypeVar("_T")

_SEEN_WITHIN = 15.0
"""Seconds within which rank 0 must see what another machine has written: caches of network file systems."""


@dataclass(frozen=True)
class Save:
    """What one save writes: `tensors`, a nested dict, and `state`, which JSON can hold."""

    step: int
    tensors: Mapping[str, Any]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a save ended. problem: why it failed, or None. notes: what is worth telling."""

    problem: str | None
    notes: tuple[str, ...] = ()
    bytes: int = 0
    seconds: float = 0.0


def from_rank_0(value: _T, group: dist.ProcessGroup) -> _T:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def write(save: Save, store: Store, group: dist.ProcessGroup) -> Outcome:
    """Write and publish `save`; the same outcome on every rank."""
    began = time.perf_counter()
    world = dist.get_world_size(group)
    need = disk_space.estimate(save.tensors, world)
    failpoints.reach("before write")
    partial, problem = from_rank_0(_begin(save.step, store, need), group)
    if partial is None:
        return Outcome(problem)

    contents: dict[str, Content] = {}
    try:
        writer = HashingWriter(partial, store.algorithm)
        dcp.save(dict(save.tensors), storage_writer=writer, process_group=group)
        contents = writer.contents
    except (Exception, CheckpointException) as error:
        problem = disk_space.why(error, store.folder, need)
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (problem, contents), group=group)

    outcome = Outcome(None)
    if dist.get_rank() == 0:
        problem = next((problem for problem, _ in told if problem), None)
        files = {name: content for _, written in told for name, content in written.items()}
        problem = problem or _unseen(partial, [written for _, written in told])
        outcome = _publish(save, store, partial, files, problem, need, began)
    outcome = from_rank_0(outcome, group)
    if outcome.problem is not None:
        store.discard(partial)  # where rank 0's disk is not this one's
    return outcome


def _unseen(partial: Path, written: Sequence[Mapping[str, Content]]) -> str | None:
    """On rank 0: which ranks' files are not in `partial` as they were `written`, by rank."""
    end = time.monotonic() + _SEEN_WITHIN
    while True:
        wrong = {
            rank: problem
            for rank, files in enumerate(written)
            for name, content in files.items()
            if (problem := _not_as_written(partial / name, content)) is not None
        }
        if not wrong or time.monotonic() > end:
            break
        time.sleep(0.25)
    if not wrong:
        return None
    ranks = ("rank " if len(wrong) == 1 else "ranks ") + ", ".join(map(str, wrong))
    return (
        f"files of {ranks} are not visible to rank 0: job.dump_folder must be on a file system that all "
        f"machines share ({next(iter(wrong.values()))})"
    )


def _not_as_written(path: Path, content: Content) -> str | None:
    try:
        with path.open("rb") as file:  # opening it makes NFS ask the server
            have = os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if have == content.bytes else f"{path}: {have} bytes, of {content.bytes}"


class Pending:
    """An asynchronous save: a thread that writes what was copied."""

    def __init__(self, save: Save, final: bool, lost: float, store: Store, group: dist.ProcessGroup):
        self.step, self.final, self.lost = save.step, final, lost
        self._result: Outcome | BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(save, store, group), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, save: Save, store: Store, group: dist.ProcessGroup) -> None:
        try:
            self._result = write(save, store, group)
        except BaseException as error:  # handed on to the trainer
            self._result = error

    def done(self) -> bool:
        """Whether this process has written and knows the outcome."""
        return not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """How it ended, when it has."""
        self._thread.join()
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        return self._result


def _begin(step: int, store: Store, need: int) -> tuple[Path | None, str | None]:
    """On rank 0: the new folder, or why there is none."""
    if dist.get_rank() != 0:
        return None, None
    try:
        have = disk_space.free(store.folder)
        if have < need:
            return None, disk_space.too_small(store.folder, need, have)
        return store.begin(step), None
    except OSError as error:
        return None, disk_space.why(error, store.folder, need)


def _publish(
    save: Save,
    store: Store,
    partial: Path,
    files: dict[str, Content],
    problem: str | None,
    need: int,
    began: float,
) -> Outcome:
    """On rank 0, when all have written: give the folder its name, then delete what is too old."""
    if problem is not None:
        store.discard(partial)
        return Outcome(problem)
    try:
        state = json.dumps(save.state, indent=1).encode()
        files[STATE] = write_synced(partial / STATE, state, store.algorithm)
        notes = store.commit(partial, save.step, files, _about(save.state))
    except OSError as error:
        problem = disk_space.why(error, store.folder, need)
        if partial.exists():  # it never got its name
            store.discard(partial)
            return Outcome(problem)
        notes = [f"after it was published: {problem}"]
    try:
        gone = store.purge()
    except OSError as error:
        notes.append(f"an older checkpoint was not deleted: {error}")
    else:
        notes += [f"deleted step {step}, as checkpoint.keep_latest_k asks" for step in gone]
    total = sum(content.bytes for content in files.values())
    return Outcome(None, tuple(notes), total, time.perf_counter() - began)


def _about(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest tells about where a checkpoint comes from."""
    return {
        "world_size": state["world_size"],
        "layout": state.get("layout", {}),
        "config_sha256": manifest.config_hash(state.get("config", {})),
        "versions": {name: state[name] for name in ("octavo", "torch", "python") if name in state},
    }
