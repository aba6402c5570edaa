"""JSON Lines files (one object per line) that stay consistent when a run is killed and resumed."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from octavo.core.fs import open_append, write_file
from octavo.core.logging import logger


def _step_of(line: str) -> float:
    """The step of a line; infinity for a truncated line or one without a step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return math.inf


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity; they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Jsonl:
    """A file `NAME.jsonl` of objects with a `step`, in full precision."""

    def __init__(self, path: Path):
        self._path = path

    def start(self, step: int) -> None:
        """Keep the lines up to `step`, so that a resumed run has each step once. If none is left, the file is
        of an older run and is renamed.
        """
        if not self._path.exists():
            self._path.unlink(missing_ok=True)  # a dangling link; writing would create its target
            return
        kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
        if not kept:
            stamp = datetime.fromtimestamp(self._path.stat().st_mtime).strftime("%Y%m%d-%H%M%S-%f")
            self._path.rename(self._path.with_name(f"{self._path.stem}.{stamp}.jsonl"))
            return
        write_file(self._path, "".join(f"{line}\n" for line in kept))

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append one line per row. If that fails (a full disk), the lines are dropped with a warning."""
        line = "".join(
            json.dumps({name: _finite(value) for name, value in row.items()}) + "\n" for row in rows
        )
        whole = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open_append(self._path) as file:
                file.write(line.encode())
        except OSError as error:
            logger.warning("%s: a line could not be written: %s", self._path, error.strerror)
            with contextlib.suppress(OSError):
                os.truncate(self._path, whole)  # leave no truncated line
