"""A stand-in for Python that has torch loaded already, for tests that start programs.

`python()` is a path to name in place of `sys.executable`, or in OCTAVO_PYTHON. What starts there is a small
client (`client.py`), which hands its arguments, variables, working directory and standard files to a server
(`server.py`) that forks: 0.1 s, where importing torch takes seconds. What that process starts by
`sys.executable` goes the same way. No module of octavo is loaded before the fork.

Signals that can be caught are passed on, the exit code or the signal comes back, and when the client is
killed the process is too. It is no child of the one that started it, though, and leads a session of its own:
what kills a parent, or a process group, is tested with `sys.executable`.
"""

import atexit
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path


@cache
def python() -> str:
    """The stand-in's path; Python's own where the system is not Linux. Its server ends with this process."""
    if sys.platform != "linux":
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="octavo-warm-"))
    here, program, socket = Path(__file__).parent, folder / "python", folder / "socket"
    command = shlex.join([sys.executable, "-IS", str(here / "client.py"), str(socket)])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-P", here / "server.py", socket, program],
        stdin=subprocess.PIPE,  # closed when this process ends, and then the server ends
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    atexit.register(_end, server, folder)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the server of tests.helpers.warm did not start"
    return str(program)


def _end(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.communicate()
    shutil.rmtree(folder, ignore_errors=True)
