"""Errors of checkpoints; their messages name the file."""

from octavo.core.errors import ConfigError


class DamagedCheckpoint(ConfigError):
    """A checkpoint, or a file of it, differs from what was written."""


class RefusedCheckpoint(DamagedCheckpoint):
    """A checkpoint contains something other than tensors, which could run code. Nothing of it was run."""


class NoCheckpointVerifies(ConfigError):
    """There are checkpoints, and none verifies. The run ends with exit code 3 instead of silently starting
    over.
    """

    exit_code = 3


class SavesFailed(ConfigError):
    """Too many saves in a row failed, or the last save of a run did. On another disk the same command
    resumes, so the exit code is 1.
    """

    exit_code = 1
