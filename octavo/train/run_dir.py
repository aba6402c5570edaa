"""The folder of a run, locked so that only one run at a time writes to it.

Two runs in one folder would interleave their metrics and overwrite each other's checkpoints. The operating
system releases the file lock whenever the process ends, so no stale lock remains.
"""

from pathlib import Path

from octavo.config import ConfigError
from octavo.core.file_lock import open_lock, try_lock

LOCK = ".lock"


class RunFolder:
    """The folder `path`, created if missing. With `lock`, it is locked until `release` or the process ends.

    Raises `ConfigError` if the folder can't be created or written to, or if another run holds the lock.
    """

    def __init__(self, path: str, *, lock: bool):
        self.path = Path(path).expanduser()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = open_lock(self.path / LOCK) if lock else None
        except OSError as error:
            raise ConfigError(f"job.dump_folder = {path}: cannot write there: {error.strerror}") from None
        if self._file is not None and not try_lock(self._file):
            raise ConfigError(
                f"job.dump_folder = {path}: another run is writing there; wait for it, or name another folder"
            )

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self._file.close()
