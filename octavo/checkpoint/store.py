"""The folder of a run's checkpoints: what is published, what verifies, what is kept.

    step-20/                  published: complete and on disk when it got this name, never changed again
    step-30.tmp-1f2e/         being written, or being deleted; removed when a run starts
    step-20.aside-0/          was in the way of a new step 20; kept until you delete it

A checkpoint is written under a temporary name, every file synced, then renamed, then the parent is synced.
To delete one it is first renamed to a temporary name. So at any instant each `step-N` is whole or, if a disk
damaged it, told by its manifest.

No torch here: tools that list checkpoints start fast.
"""

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.checkpoint import failpoints, manifest
from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, NoCheckpointVerifies
from octavo.checkpoint.hashing import Content, differences, write_synced
from octavo.core.errors import ConfigError

_STEP = re.compile(r"step-(0|[1-9]\d*)")
_PARTIAL = re.compile(r"step-\d+\.tmp(-\w+)?")


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is published."""
    return folder / f"step-{step}"


def published(folder: Path) -> list[int]:
    """The steps that have a folder of their final name, whole or not, ascending."""
    if not folder.is_dir():
        return []
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def problems(path: Path) -> list[str]:
    """What is wrong with the checkpoint in `path`: "file: problem" each; empty if it verifies."""
    match = _STEP.fullmatch(path.name)
    try:
        found = manifest.read(path, int(match[1]) if match else None)
    except DamagedCheckpoint as error:
        return [str(error)]
    return differences(path, found["files"], found["hash"])


def latest(folder: Path) -> Path:
    """The newest checkpoint in `folder` that verifies.

    Raises:
        NoCheckpointVerifies: there are some, and none verifies; the message says what is wrong with each.
        ConfigError: there is none.
    """
    wrong = {}
    for step in reversed(published(folder)):
        path = path_of(folder, step)
        wrong[step] = problems(path)
        if not wrong[step]:
            return path
    if not wrong:
        raise ConfigError(f"{folder} holds no checkpoint")
    raise none_verifies(folder, wrong)


def none_verifies(folder: Path, wrong: Mapping[int, list[str]]) -> NoCheckpointVerifies:
    """The error that says what is wrong with each of the steps in `wrong`."""
    rows = "".join(f"\n  {path_of(folder, step).name}: {told(found)}" for step, found in wrong.items())
    return NoCheckpointVerifies(
        f"{folder} holds checkpoints and none of them verifies:{rows}\n"
        "To start from step 0 name another job.dump_folder or checkpoint.folder, or move these away"
    )


def told(found: list[str]) -> str:
    """Problems in one line."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Store:
    """Writes to `folder`; one process of a job does (rank 0).

    `keep`: how many verified checkpoints stay, 0 for all. `good`: the steps known to verify, because they
    were written or read by this process.
    """

    def __init__(self, folder: Path, *, keep: int, algorithm: str):
        self.folder = folder
        self.algorithm = algorithm
        self.good: set[int] = set()
        self._keep = keep

    def clean(self) -> list[str]:
        """Remove what an ended run left half written or half deleted; returns the names."""
        if not self.folder.is_dir():
            return []
        left = [
            path
            for path in self.folder.iterdir()
            if _PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
        for path in left:
            shutil.rmtree(path)
        return [path.name for path in left]

    def begin(self, step: int) -> Path:
        """A new folder to write `step` into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._temporary(step)
        partial.mkdir()
        return partial

    def discard(self, partial: Path) -> None:
        """Remove what `begin` gave."""
        shutil.rmtree(partial, ignore_errors=True)

    def commit(
        self, partial: Path, step: int, files: Mapping[str, Content], about: Mapping[str, Any]
    ) -> list[str]:
        """Publish `partial`, whose `files` are written and synced, as `step`; returns what is worth telling.

        What stands where it goes is set aside, and so is every later step that this run neither wrote nor
        went on from: a run that was sent back goes another way now, and must not be resumed from those.
        """
        failpoints.reach("before manifest")
        write_synced(partial / manifest.FILE, manifest.render(step, self.algorithm, files, about))
        failpoints.reach("after manifest")
        sync_folder(partial)
        failpoints.reach("before rename")
        there = {other for other in published(self.folder) if other >= step}
        if os.path.lexists(path_of(self.folder, step)):  # a file, say
            there.add(step)
        notes = [self._set_aside(other) for other in sorted(there)]
        partial.rename(path_of(self.folder, step))
        failpoints.reach("after rename")
        sync_folder(self.folder)
        self.good.add(step)
        return notes

    def _set_aside(self, step: int) -> str:
        path = path_of(self.folder, step)
        number = 0
        while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
            number += 1
        path.rename(aside)
        self.good.discard(step)
        return f"{path} was there already and is now {aside.name}; delete it when you do not need it"

    def purge(self) -> list[int]:
        """Delete what is older than the newest `keep` that verify; returns the steps deleted.

        A checkpoint of which this process knows nothing is verified first, once. One that does not verify is
        not counted; it goes when `keep` newer ones verify.
        """
        counted, gone = 0, []
        for step in reversed(published(self.folder) if self._keep else []):
            if counted == self._keep:
                self._delete(step)
                gone.append(step)
            elif step in self.good or not problems(path_of(self.folder, step)):
                self.good.add(step)
                counted += 1
        return gone

    def _delete(self, step: int) -> None:
        doomed = path_of(self.folder, step).rename(self._temporary(step))
        self.good.discard(step)
        sync_folder(self.folder)
        for path in sorted(doomed.iterdir()):
            if path.is_file():
                path.unlink()
                failpoints.reach("during purge")
        shutil.rmtree(doomed)

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step-{step}.tmp-{secrets.token_hex(4)}"
