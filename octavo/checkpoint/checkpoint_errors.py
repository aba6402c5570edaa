"""What can be wrong with checkpoints, as exceptions whose messages name the file."""

from octavo.core.errors import ConfigError


class DamagedCheckpoint(ConfigError):
    """A checkpoint, or one file of it, is not what was written; the message names it and says what is
    wrong.
    """


class RefusedCheckpoint(DamagedCheckpoint):
    """Reading on would run or build what no checkpoint needs; the message names it. Nothing was run."""


class NoCheckpointVerifies(ConfigError):
    """There are checkpoints and none can be relied on. Starting anew would hide that, so the run ends with
    exit code 3.
    """

    exit_code = 3


class SavesFailed(ConfigError):
    """Too many saves in a row failed, or the last one of a run did; the message says why. With another disk
    the same command would go on, so the exit code is 1.
    """

    exit_code = 1
