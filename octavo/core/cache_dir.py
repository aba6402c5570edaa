"""The folder of files that octavo can recompute."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/octavo, or octavo/ in XDG_CACHE_HOME. Raises RuntimeError for a user without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo"
