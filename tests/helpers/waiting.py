"""Waiting in tests: for an event, never for a time.

`LIMIT` ends a wait for what never comes. It is far above what a machine twenty times slower than a quiet one
needs, so what only comes late is waited for, and no test's verdict is about speed.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

LIMIT = 900.0
"""Seconds. Also for `subprocess` (`timeout=LIMIT`), whose error names the command."""


def wait_for(what: str, condition: Callable[[], Found]) -> Found:
    """Until `condition()` is true; returns it.

    Raises `AssertionError`, which says `what` was waited for, after `LIMIT`. A condition that can tell that
    it will never be met raises an error of its own.
    """
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {LIMIT:g} s for {what}"
        time.sleep(0.02)
    return found


def wait_for_text(path: Path, text: str) -> str:
    """Until `path` has `text` in it; returns its content."""
    wait_for(f"{text!r} in {path}", lambda: path.exists() and text in path.read_text())
    return path.read_text()
