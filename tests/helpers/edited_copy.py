"""Asks a program with a copy of octavo in which some files have more text: what follows from one row."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.helpers.waiting import LIMIT


def ask_edited_copy(folder: Path, edits: Mapping[str, tuple[str, str]], program: str) -> dict[str, Any]:
    """The JSON object that `program` prints in `folder`.

    edits: path in the repository -> a text that occurs in the file once, and what is inserted after it.
    """
    _link(ROOT / "octavo", folder / "octavo", {ROOT / path for path in edits})
    for path, (before, inserted) in edits.items():
        source = (ROOT / path).read_text()
        assert source.count(before) == 1, f"{path} has {source.count(before)} times: {before}"
        (folder / path).write_text(source.replace(before, before + inserted))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _link(source: Path, target: Path, but: set[Path]) -> None:
    """Make `target` a copy of `source` by links, without the files in `but`."""
    if source in but:
        return
    if not any(path.is_relative_to(source) for path in but):
        target.symlink_to(source)
        return
    target.mkdir()
    for part in source.iterdir():
        if part.name != "__pycache__":
            _link(part, target / part.name, but)
