"""The stand-in behaves as Python does, to whoever starts it."""

import os
import select
import signal
import subprocess
import sys

import pytest

from tests.helpers import warm
from tests.helpers.waiting import LIMIT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in needs Linux's pidfd_open")


def both(*argv, **options):
    """What Python and the stand-in answer to the same: exit code, standard output and error."""
    told = []
    for program in (sys.executable, warm.python()):
        done = subprocess.run([program, *argv], capture_output=True, text=True, timeout=LIMIT, **options)
        told.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    return told


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["-c", "import sys; print(sys.argv, sys.stdin.read()); sys.exit(3)", "a b", ""], 3),
        (["-P", "-c", "import sys, os; print(sys.path, os.getcwd(), os.environ['ABC'], os.getppid())"], 0),
        (["-c", "import sys; print(sys.path, __name__); sys.exit('a word')"], 1),
        (["-m", "here", "x"], 0),
        (["here.py"], 0),
        (["-c", "import atexit; atexit.register(print, 'late'); raise ValueError('wrong')"], 1),
        (["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], -signal.SIGKILL),
        (["-c", "raise KeyboardInterrupt"], -signal.SIGINT),
    ],
)
def test_answers_as_python_does(argv, code, tmp_path):
    (tmp_path / "here.py").write_text("import sys; print(__name__, __file__, sys.argv, sys.path)")
    environ = {**os.environ, "ABC": "1"}
    python, stand_in = both(*argv, cwd=tmp_path, env=environ, input="given\n")
    assert python == stand_in
    assert python[0] == code


def started(code):
    process = subprocess.Popen([warm.python(), "-u", "-c", code], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_signals_are_passed_on():
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit(75)); print(1); signal.pause()"
    process, _ = started(code)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 75


def test_what_is_killed_is_gone():
    process, other = started("import os, time; print(os.getpid()); time.sleep(600)")
    gone = os.pidfd_open(int(other))
    process.kill()
    process.communicate(timeout=LIMIT)
    assert select.select([gone], [], [], LIMIT)[0]
    os.close(gone)


def test_what_it_starts_goes_the_same_way():
    code = "import sys; print(sys.executable, 'torch' in sys.modules)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    done = subprocess.run([warm.python(), "-c", parent], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == f"{warm.python()} True\n", done.stderr
