"""A process whose standard streams are closed works, and no file takes their numbers."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.waiting import LIMIT

CODE = """
import os, sys
from octavo.core.streams import open_closed_streams
open_closed_streams()
with open(sys.argv[1], "w") as file:
    print("to nobody"), os.write(2, b"of a library in C")
    file.write(f"{file.fileno() > 2} {sys.stderr.isatty()} {sys.stdin.read()!r}")
"""


def test_closed_streams_are_opened(tmp_path):
    command = [
        "sh",
        "-c",
        'exec "$0" -c "$1" "$2" <&- >&- 2>&-',
        sys.executable,
        CODE,
        str(tmp_path / "said"),
    ]
    subprocess.run(command, check=True, timeout=LIMIT, cwd=Path(__file__).resolve().parents[2])
    assert (tmp_path / "said").read_text() == "True False ''"
