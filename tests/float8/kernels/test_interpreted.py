"""Starts the tests of `interpreted/`, each file in a process that interprets Triton; see its conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.float8.kernels import needs

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
PARTS = 4  # each is a process, which imports torch and Triton
ROOT = Path(__file__).resolve().parents[3]


@needs.triton
@needs.interpreter
@pytest.mark.parametrize("part", range(PARTS))
def test_under_the_interpreter(part: int) -> None:
    files = map(str, FILES[part::PARTS])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])
