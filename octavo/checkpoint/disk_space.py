"""What a save will take, and what the disk has, before anything is written; and why a save failed."""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

_PER_ENTRY = 4096  # the archive around one tensor of one rank, and its lines in .metadata
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def estimate(tensors: Mapping[str, Any], world_size: int) -> int:
    """Bytes that a checkpoint of the nested dict `tensors` takes at most, by all `world_size` ranks.

    A sharded tensor counts whole and once: its shape is that of the whole.
    """
    return sum(leaf.numel() * leaf.element_size() + _PER_ENTRY * world_size for leaf in _leaves(tensors))


def _leaves(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Mapping):
        return [leaf for value in tensors.values() for leaf in _leaves(value)]
    return [tensors] if isinstance(tensors, Tensor) else []


def free(folder: Path) -> int:
    """Bytes that may be written below `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def size(count: int) -> str:
    """A number of bytes in words."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def too_small(folder: Path, need: int, have: int) -> str:
    """The message for a disk without room."""
    return f"no space: it needs {size(need)}, and {folder} has {size(have)} free"


def why(error: BaseException, folder: Path, need: int) -> str:
    """What went wrong in a save, in one line; where the disk is full, need and have."""
    causes: list[tuple[int | None, BaseException]] = [(None, error)]
    if isinstance(error, CheckpointException):
        causes = [(rank, failure[0]) for rank, failure in sorted(error.failures.items())]
    for _, cause in causes:
        if isinstance(cause, KeyboardInterrupt):
            raise cause
    chain = [link for _, cause in causes for link in _chain(cause)]
    if any(isinstance(link, OSError) and link.errno in _FULL for link in chain):
        return too_small(folder, need, free(folder))
    if any(os.strerror(code) in str(link) for link in chain for code in _FULL):
        return too_small(folder, need, free(folder))
    rank, cause = causes[0]
    where = "" if rank is None else f"rank {rank}: "
    return f"{where}{type(cause).__name__}: {str(cause).strip()[:300]}"


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ or link.__context__
    return found
