"""One save on all ranks, from tensors to a published folder.

Each rank writes its shards with DCP (torch.distributed.checkpoint). Rank 0 creates the folder, checks that it
sees the files of the other ranks, writes the state and the manifest, and publishes. Every rank gets the same
result. A failure is a result and not an exception, because training continues after it.
"""

import errno
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from octavo.checkpoint import failpoints, manifest
from octavo.checkpoint.manifest import FileDigest, HashingFile, write_synced
from octavo.checkpoint.reader import STATE
from octavo.checkpoint.store import Store
from octavo.core.format import format_bytes

_T = TypeVar("_T")

_VISIBLE_WITHIN = 15.0  # seconds in which rank 0 must see other machines' files: network file systems cache
_BYTES_PER_ENTRY = 4096  # the archive around one tensor of one rank, and its lines in .metadata
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Snapshot:
    """The content of one save: `tensors`, a nested dict, and `state`, which is JSON-able."""

    step: int
    tensors: Mapping[str, Any]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class SaveResult:
    """The result of a save. problem: why it failed, or None. notes: for the log."""

    problem: str | None
    notes: tuple[str, ...] = ()
    bytes: int = 0
    seconds: float = 0.0


def broadcast_from_rank_0(value: _T, group: dist.ProcessGroup) -> _T:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def write_checkpoint(snapshot: Snapshot, store: Store, group: dist.ProcessGroup) -> SaveResult:
    """Write and publish `snapshot`; the same result on every rank."""
    began = time.perf_counter()
    world = dist.get_world_size(group)
    need = estimate_bytes(snapshot.tensors, world)
    failpoints.reach("before write")
    partial, problem = broadcast_from_rank_0(_create_folder(snapshot.step, store, need), group)
    if partial is None:
        return SaveResult(problem)

    digests: dict[str, FileDigest] = {}
    try:
        writer = HashingWriter(partial, store.algorithm)
        dcp.save(dict(snapshot.tensors), storage_writer=writer, process_group=group)
        digests = writer.digests
    except (Exception, CheckpointException) as error:
        problem = describe_failure(error, store.folder, need)
    by_rank: list[Any] = [None] * world
    dist.all_gather_object(by_rank, (problem, digests), group=group)

    result = SaveResult(None)
    if dist.get_rank() == 0:
        problem = next((problem for problem, _ in by_rank if problem), None)
        problem = problem or _find_invisible_files(partial, [digests for _, digests in by_rank])
        files = {name: digest for _, digests in by_rank for name, digest in digests.items()}
        result = _publish(snapshot, store, partial, files, problem, need, began)
    result = broadcast_from_rank_0(result, group)
    if result.problem is not None:
        store.discard(partial)  # in case this machine's disk is not rank 0's
    return result


def _create_folder(step: int, store: Store, need: int) -> tuple[Path | None, str | None]:
    """On rank 0: the new folder, or the reason why it cannot be created."""
    if dist.get_rank() != 0:
        return None, None
    try:
        free = free_bytes(store.folder)
        if free < need:
            return None, _no_space(store.folder, need, free)
        return store.create_partial(step), None
    except OSError as error:
        return None, describe_failure(error, store.folder, need)


def _find_invisible_files(partial: Path, written: Sequence[Mapping[str, FileDigest]]) -> str | None:
    """On rank 0: an error if files that the ranks have `written` are not complete in `partial`."""
    end = time.monotonic() + _VISIBLE_WITHIN
    while True:
        wrong = {
            rank: problem
            for rank, files in enumerate(written)
            for name, digest in files.items()
            if (problem := _check_size(partial / name, digest)) is not None
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


def _check_size(path: Path, digest: FileDigest) -> str | None:
    try:
        with path.open("rb") as file:  # opening the file makes NFS ask the server
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if size == digest.bytes else f"{path}: {size} bytes, of {digest.bytes}"


def _publish(
    snapshot: Snapshot,
    store: Store,
    partial: Path,
    files: dict[str, FileDigest],
    problem: str | None,
    need: int,
    began: float,
) -> SaveResult:
    """On rank 0, after all ranks have written: publish the folder, then delete old checkpoints."""
    if problem is not None:
        store.discard(partial)
        return SaveResult(problem)
    try:
        state = json.dumps(snapshot.state, indent=1).encode()
        files[STATE] = write_synced(partial / STATE, state, store.algorithm)
        notes = store.publish(partial, snapshot.step, files, _manifest_fields(snapshot.state))
    except OSError as error:
        problem = describe_failure(error, store.folder, need)
        if partial.exists():  # it was not renamed
            store.discard(partial)
            return SaveResult(problem)
        notes = [f"after it was published: {problem}"]
    try:
        deleted = store.delete_old()
    except OSError as error:
        notes.append(f"an older checkpoint was not deleted: {error}")
    else:
        notes += [f"deleted step {step} (checkpoint.keep_latest_k)" for step in deleted]
    total = sum(digest.bytes for digest in files.values())
    return SaveResult(None, tuple(notes), total, time.perf_counter() - began)


def _manifest_fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """Where a checkpoint comes from, for its manifest."""
    return {
        "world_size": state["world_size"],
        "layout": state.get("layout", {}),
        "config_sha256": manifest.config_hash(state.get("config", {})),
        "versions": {name: state[name] for name in ("octavo", "torch", "python") if name in state},
    }


class PendingSave:
    """An asynchronous save: a thread that writes a copy of the tensors.

    final: whether it is the run's last save. paused: seconds that training has paused for it so far.
    """

    def __init__(
        self, snapshot: Snapshot, final: bool, paused: float, store: Store, group: dist.ProcessGroup
    ):
        self.step, self.final, self.paused = snapshot.step, final, paused
        self._result: SaveResult | BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, store, group), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, snapshot: Snapshot, store: Store, group: dist.ProcessGroup) -> None:
        try:
            self._result = write_checkpoint(snapshot, store, group)
        except BaseException as error:  # raised again in the trainer's thread
            self._result = error

    def done(self) -> bool:
        """Whether this process has finished and has the result."""
        return not self._thread.is_alive()

    def result(self) -> SaveResult:
        """Wait for the save to finish; its result."""
        self._thread.join()
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        return self._result


class _HashingFileSystem(FileSystem):
    def __init__(self, algorithm: str):
        self.digests: dict[str, FileDigest] = {}
        self._algorithm = algorithm

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        assert mode == "wb", mode
        with HashingFile(Path(path), self._algorithm) as stream:
            failpoints.reach("during write")
            try:
                yield cast(Any, stream)
            except Exception as error:  # torch's writer reports a full disk as an unexpected position
                raise stream.error or error from None
        self.digests[Path(path).name] = stream.digest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """DCP's writer into the empty `folder`, which hashes files while it writes them.

    DCP writes and syncs one file per rank and, on rank 0, `.metadata`.
    """

    def __init__(self, folder: Path, algorithm: str):
        super().__init__(folder)
        self.fs = self._files = _HashingFileSystem(algorithm)

    @property
    def digests(self) -> dict[str, FileDigest]:
        """The digests of this rank's files, by name."""
        return self._files.digests

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync this rank's tensors."""
        crc32 = get_crc32_options()
        set_crc32_options(False)  # torch.save would checksum each tensor for zip tools; torch.load ignores it
        try:
            done = super().write_data(plan, planner)
        finally:
            set_crc32_options(crc32)
        failpoints.reach("after shard")
        return done


def estimate_bytes(tensors: Mapping[str, Any], world_size: int) -> int:
    """An upper bound of the bytes of a checkpoint of the nested dict `tensors`, over all ranks.

    A sharded tensor has the shape of the unsharded one and counts once.
    """
    return sum(
        tensor.numel() * tensor.element_size() + _BYTES_PER_ENTRY * world_size for tensor in _flatten(tensors)
    )


def _flatten(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Mapping):
        return [tensor for value in tensors.values() for tensor in _flatten(value)]
    return [tensors] if isinstance(tensors, Tensor) else []


def free_bytes(folder: Path) -> int:
    """Free space on the disk of `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _no_space(folder: Path, need: int, free: int) -> str:
    return f"no space: it needs {format_bytes(need)}, and {folder} has {format_bytes(free)} free"


def describe_failure(error: BaseException, folder: Path, need: int) -> str:
    """The error of a save or load in one line; for a full disk, the `need`ed and the free bytes."""
    causes: list[tuple[int | None, BaseException]] = [(None, error)]
    if isinstance(error, CheckpointException):
        causes = [(rank, failure[0]) for rank, failure in sorted(error.failures.items())]
    for _, cause in causes:
        if isinstance(cause, KeyboardInterrupt):
            raise cause
    chain = [link for _, cause in causes for link in _exception_chain(cause)]
    disk_full = any(isinstance(link, OSError) and link.errno in _DISK_FULL for link in chain)
    if disk_full or any(os.strerror(code) in str(link) for link in chain for code in _DISK_FULL):
        return _no_space(folder, need, free_bytes(folder))
    rank, cause = causes[0]
    prefix = "" if rank is None else f"rank {rank}: "
    return f"{prefix}{type(cause).__name__}: {str(cause).strip()[:300]}"


def _exception_chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain
