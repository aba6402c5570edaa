"""`leave`: an end like that of `sys.exit`, for all that a process has promised."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]
PROMISES = """
import atexit, concurrent.futures, sys, threading, time
from octavo.core.exit_codes import leave
atexit.register(print, "atexit")
def late():
    time.sleep(0.3)
    sys.stdout.write("thread\\n")
threading.Thread(target=late).start()
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(late).result()
pool.submit(late)
print("main")
leave(75)
print("never")
"""


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=buffered, text=True, timeout=LIMIT, **options
    )


def test_what_was_promised_is_kept():
    done = run(PROMISES, capture_output=True)
    assert (done.returncode, done.stderr) == (75, "")
    lines = done.stdout.split()
    assert sorted(lines) == ["atexit", "main", "thread", "thread", "thread"]
    assert lines[-1] == "atexit"


def test_the_interpreter_is_not_taken_apart():
    code = (
        "from octavo.core.exit_codes import leave\n"
        "class Told:\n"
        "    def __del__(self): print('taken apart')\n"
        "told = Told()\n"
    )
    assert run(code, capture_output=True).stdout == "taken apart\n"
    assert run(code + "leave(0)", capture_output=True).stdout == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_told():
    code = "from octavo.core.exit_codes import leave\nprint('lost')\nleave(0)"
    with open("/dev/full", "w") as full:
        done = run(code, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 120, "Python's code for it"
    assert "No space left" in done.stderr


def test_a_reader_that_is_gone_changes_no_exit_code():
    read, write = os.pipe()
    os.close(read)
    code = "from octavo.core.exit_codes import leave\nprint('for nobody')\nleave(75)"
    done = run(code, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (75, "")
