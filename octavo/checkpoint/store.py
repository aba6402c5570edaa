"""The folder of a run's checkpoints: publishing, verifying and deleting them.

    step-20/                  published: complete and synced before it got this name, never changed again
    step-30.tmp-1f2e/         being written or deleted; removed when a run starts
    step-20.aside-0/          was in the way of a new step 20; kept until the user deletes it

A checkpoint is written under a temporary name, every file is synced, then the folder is renamed, then its
parent is synced. A checkpoint is renamed to a temporary name before it is deleted. So at any time each
`step-N` is complete, and its manifest detects damage by the disk.

This module does not import torch, so that tools which list checkpoints start fast.
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
from octavo.checkpoint.manifest import FileDigest, verify_files, write_synced
from octavo.core.errors import ConfigError
from octavo.core.fs import sync

_STEP = re.compile(r"step-(0|[1-9]\d*)")
_PARTIAL = re.compile(r"step-\d+\.tmp(-\w+)?")


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the published checkpoint of `step`."""
    return folder / f"step-{step}"


def published_steps(folder: Path) -> list[int]:
    """The steps that have a published folder, damaged or not, ascending."""
    if not folder.is_dir():
        return []
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def find_problems(path: Path) -> list[str]:
    """Verify the checkpoint in `path`: its problems, each as "file: problem"; empty if it verifies."""
    match = _STEP.fullmatch(path.name)
    try:
        fields = manifest.read(path, int(match[1]) if match else None)
    except DamagedCheckpoint as error:
        return [str(error)]
    return verify_files(path, fields["files"], fields["hash"])


def latest(folder: Path) -> Path:
    """The newest checkpoint in `folder` that verifies.

    Raises:
        NoCheckpointVerifies: there are checkpoints, but none verifies; the message lists their problems.
        ConfigError: there is no checkpoint.
    """
    problems = {}
    for step in reversed(published_steps(folder)):
        path = step_folder(folder, step)
        problems[step] = find_problems(path)
        if not problems[step]:
            return path
    if not problems:
        raise ConfigError(f"{folder} contains no checkpoint")
    raise none_verifies(folder, problems)


def none_verifies(folder: Path, problems: Mapping[int, list[str]]) -> NoCheckpointVerifies:
    """The error for a folder in which every step has `problems`."""
    rows = "".join(f"\n  step-{step}: {summarize(found)}" for step, found in problems.items())
    return NoCheckpointVerifies(
        f"{folder} contains checkpoints, but none of them verifies:{rows}\n"
        "To start from step 0, set another job.dump_folder or checkpoint.folder, or move these away"
    )


def summarize(problems: list[str]) -> str:
    """The first three problems in one line, and how many more there are."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


class Store:
    """Publishes and deletes checkpoints in `folder`; only one process of a job (rank 0) uses it.

    Args:
        keep: how many verified checkpoints to keep; 0 keeps all.
        algorithm: of the checksums, one of `manifest.ALGORITHMS`.

    Attributes:
        verified: the steps that this process wrote or verified.
    """

    def __init__(self, folder: Path, *, keep: int, algorithm: str):
        self.folder = folder
        self.algorithm = algorithm
        self.verified: set[int] = set()
        self._keep = keep

    def remove_unfinished(self) -> list[str]:
        """Remove folders that an earlier run left partly written or partly deleted; returns their names."""
        if not self.folder.is_dir():
            return []
        unfinished = [
            path
            for path in self.folder.iterdir()
            if _PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
        for path in unfinished:
            shutil.rmtree(path)
        return [path.name for path in unfinished]

    def create_partial(self, step: int) -> Path:
        """A new temporary folder for the files of `step`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._temporary_name(step)
        partial.mkdir()
        return partial

    def discard(self, partial: Path) -> None:
        """Remove a folder of `create_partial`."""
        shutil.rmtree(partial, ignore_errors=True)

    def publish(
        self, partial: Path, step: int, files: Mapping[str, FileDigest], about: Mapping[str, Any]
    ) -> list[str]:
        """Publish `partial`, whose `files` are written and synced, as `step`; returns notes for the log.

        An existing checkpoint of this step, and every later one, is set aside: it is damaged, or from before
        this run was sent back to an earlier step, and must not be resumed from.
        """
        failpoints.reach("before manifest")
        write_synced(partial / manifest.FILE, manifest.render(step, self.algorithm, files, about))
        failpoints.reach("after manifest")
        sync(partial)
        failpoints.reach("before rename")
        outdated = {other for other in published_steps(self.folder) if other >= step}
        if os.path.lexists(step_folder(self.folder, step)):  # may also be a file
            outdated.add(step)
        notes = [self._set_aside(other) for other in sorted(outdated)]
        partial.rename(step_folder(self.folder, step))
        failpoints.reach("after rename")
        sync(self.folder)
        self.verified.add(step)
        return notes

    def _set_aside(self, step: int) -> str:
        path = step_folder(self.folder, step)
        number = 0
        while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
            number += 1
        path.rename(aside)
        self.verified.discard(step)
        return f"{path} existed already and is now {aside.name}; delete it when you do not need it"

    def delete_old(self) -> list[int]:
        """Delete checkpoints older than the newest `keep` that verify; returns the deleted steps.

        A checkpoint that this process has not verified yet is verified first. One that does not verify does
        not count; it is deleted when `keep` newer ones verify.
        """
        counted, deleted = 0, []
        for step in reversed(published_steps(self.folder) if self._keep else []):
            if counted == self._keep:
                self._delete(step)
                deleted.append(step)
            elif step in self.verified or not find_problems(step_folder(self.folder, step)):
                self.verified.add(step)
                counted += 1
        return deleted

    def _delete(self, step: int) -> None:
        doomed = step_folder(self.folder, step).rename(self._temporary_name(step))
        self.verified.discard(step)
        sync(self.folder)
        for path in sorted(doomed.iterdir()):
            if path.is_file():
                path.unlink()
                failpoints.reach("during purge")
        shutil.rmtree(doomed)

    def _temporary_name(self, step: int) -> Path:
        return self.folder / f"step-{step}.tmp-{secrets.token_hex(4)}"
