"""The folder of a run, which one run at a time may write to.

Two runs in one folder would interleave their metrics and overwrite each other's checkpoints. A lock on a
file tells them apart; the system drops it when the process ends, however it ends, so nothing is left behind
to clean up.
"""

from pathlib import Path

from octavo.config import ConfigError
from octavo.core.file_lock import open_lock, try_lock

LOCK = ".lock"


class RunFolder:
    """`path`, made if it is not there. With `lock`, held for this process until it ends or `release` is
    called.

    Raises `ConfigError` if the folder can't be made or written to, or if another run holds it.
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
        """Let others write here."""
        if self._file is not None:
            self._file.close()
