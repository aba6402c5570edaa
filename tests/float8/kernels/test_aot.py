"""Every kernel and configuration compiles for GPUs that are not here, into the code that was meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.float8.kernels import needs

ROOT = Path(__file__).resolve().parents[3]
pytestmark = needs.triton


@cache
def report(arch: int, *options: str) -> list[dict[str, Any]]:
    """The rows of `python -m octavo.float8.kernels.report`, from a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "octavo.float8.kernels.report", "--json", f"--arch={arch}", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(
    scope="module", params=["90", "100 --defaults", pytest.param("100", marks=pytest.mark.slow)], ids=str
)
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    arch, *options = request.param.split()
    return report(int(arch), *options)


def test_no_default_configuration_spills(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"] for row in rows if row["default"]} == {row["kernel"] for row in rows}
    spilling = [row for row in rows if row["spilled"] and row["default"]]
    assert not spilling
    # A block of 1,024 threads may have 64 registers each, one of 256 all that a thread can have.
    assert all(0 < row["registers"] <= 255 and row["shared"] <= 64 * 1024 for row in rows)


def test_the_hardware_converts(rows: list[dict[str, Any]]) -> None:
    assert {row["native"] for row in rows if row["converts"]} == {True}
    assert {row["native"] for row in rows if not row["converts"]} == {False}


def test_every_kernel_and_configuration_is_there() -> None:
    import re

    written = {
        f"{file.stem}.{name}"
        for file in (ROOT / "octavo/float8/kernels").glob("*.py")
        for name in re.findall(r"@tuned\([^\n]*\n@triton\.jit\ndef (\w+)", file.read_text())
    }
    assert len(written) >= 10
    assert {row["kernel"] for row in report(90)} == written
