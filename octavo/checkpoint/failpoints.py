"""Named places in the life of a checkpoint, so that tests can end a process at each of them.

A run that nobody tests passes them without effect: `hook` is None.
"""

from collections.abc import Callable

NAMES = (
    "before write",  # nothing of this save is on disk
    "during staging",  # asynchronous only: some tensors are copied for the thread that writes
    "during write",  # this rank's first file is begun
    "after shard",  # this rank's files are written and synced
    "before manifest",  # all ranks' files and the state are there
    "after manifest",  # complete, under its temporary name
    "before rename",  # the folder is synced
    "after rename",  # published, the parent not yet synced
    "during purge",  # an old one has a temporary name and has lost a file
)

hook: Callable[[str], None] | None = None
"""Called with the name of each point that is reached, in the thread that reaches it."""


def reach(name: str) -> None:
    """Say that this process is at the point `name`."""
    assert name in NAMES, name
    if hook is not None:
        hook(name)
