"""Every kernel and configuration compiles ahead of time, without spills and with the native conversion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.float8.kernels import needs

if TYPE_CHECKING:
    from octavo.float8.kernels.compile_report import Compiled

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    needs.triton,
    needs.compiler,
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),  # Triton 3.9 at its first compile
]


@pytest.fixture(scope="module", params=["kept", pytest.param("compiled", marks=pytest.mark.slow)])
def rows(request: pytest.FixtureRequest) -> list[Compiled]:
    """As kept, or where they are of another Triton's compiler or asked for, compiled: minutes."""
    import triton

    from octavo.float8.kernels.compile_report import units
    from tests.float8.kernels import compiled

    version, kept = compiled.read()
    if request.param == "kept" and version == triton.__version__:
        return list(kept.values())
    return [unit.compile() for unit in (*units(90), *units(100))]


def test_no_default_configuration_spills(rows: list[Compiled]) -> None:
    for arch in (90, 100):
        mine = [row for row in rows if row.arch == arch]
        assert {row.kernel for row in mine if row.default} == {row.kernel for row in mine} != set()
    spilling = [row for row in rows if row.spilled and row.default]
    assert not spilling
    # A block of 1,024 threads may have 64 registers each, one of 256 all that a thread can have.
    assert all(0 < row.registers <= 255 and row.shared <= 64 * 1024 for row in rows)


def test_the_hardware_converts(rows: list[Compiled]) -> None:
    assert {row.native for row in rows if row.converts} == {True}
    assert {row.native for row in rows if not row.converts} == {False}


def test_every_kernel_and_configuration_is_there(rows: list[Compiled]) -> None:
    written = {
        f"{file.stem}.{name}"
        for file in (ROOT / "octavo/float8/kernels").glob("*.py")
        for name in re.findall(r"@tuned\([^\n]*\n@triton\.jit\ndef (\w+)", file.read_text())
    }
    assert len(written) >= 10
    assert {row.kernel for row in rows} == written


def test_what_is_kept_is_of_these_kernels_and_what_the_compiler_gives() -> None:
    import triton

    from tests.float8.kernels import compiled

    version, kept = compiled.read()
    if version != triton.__version__:
        pytest.skip(f"kept of Triton {version}; the tests above compile everything with {triton.__version__}")
    units = {unit.key: unit for unit in compiled.kept_units()}
    changed = {unit.job.kernel.fn.__name__ for key, unit in units.items() if key not in kept}
    assert units.keys() == kept.keys(), f"compile again: python -m tests.float8.kernels.compiled ({changed})"
    for key in (min(units), max(units)):  # any two, which change as the kernels do
        assert units[key].compile() == kept[key]
