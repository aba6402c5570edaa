"""Named points in the life of a checkpoint at which tests can kill the process.

In a normal run they do nothing: `hook` is None.
"""

from collections.abc import Callable

NAMES = (
    "before write",  # nothing of this save is on disk
    "during staging",  # asynchronous only: some tensors are copied for the writing thread
    "during write",  # this rank's first file is open
    "after shard",  # this rank's files are written and synced
    "before manifest",  # all ranks' files and the state are on disk
    "after manifest",  # complete, under the temporary name
    "before rename",  # the folder is synced
    "after rename",  # published, the parent folder not yet synced
    "during purge",  # an old checkpoint is renamed to a temporary name and has lost a file
)

hook: Callable[[str], None] | None = None
"""Called with the name of each point, in the thread that reaches it."""


def reach(name: str) -> None:
    """Call the hook, if a test has set one."""
    assert name in NAMES, name
    if hook is not None:
        hook(name)
