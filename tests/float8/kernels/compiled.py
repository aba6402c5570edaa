"""The committed compile report of every kernel, `compiled.jsonl`: one row per line.

Compiling takes minutes, and gives the same result as long as nothing that a row's key hashes has changed. If
it has, the tests fail until the file is written again, by compiling everything:

    python -m tests.float8.kernels.compiled
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from octavo.float8.kernels.compile_report import Compiled, Unit, units

FILE = Path(__file__).with_name("compiled.jsonl")


def kept_units() -> Iterator[Unit]:
    """All configurations for Hopper, and the defaults for Blackwell."""
    yield from units(90)
    yield from units(100, only_defaults=True)


def read() -> tuple[str, dict[str, Compiled]]:
    """The version of Triton that compiled them, and the rows by key."""
    version, *lines = FILE.read_text().splitlines()
    rows = [Compiled(**json.loads(line)) for line in lines]
    return json.loads(version)["triton"], {row.key: row for row in rows}


def main() -> None:
    import triton

    rows = [json.dumps(asdict(unit.compile())) for unit in kept_units()]
    FILE.write_text("\n".join([json.dumps({"triton": triton.__version__}), *rows, ""]))


if __name__ == "__main__":
    main()
