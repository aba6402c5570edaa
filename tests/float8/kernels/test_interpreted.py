"""Runs the tests of `interpreted/` in a process that interprets Triton; see its conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.float8.kernels import needs

FOLDER = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).resolve().parents[3]


@needs.triton
@needs.interpreter
def test_under_the_interpreter() -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])
