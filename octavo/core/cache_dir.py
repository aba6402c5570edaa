"""Where octavo keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/octavo, or within XDG_CACHE_HOME; `RuntimeError` for a user without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo"
