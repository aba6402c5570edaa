"""Processes of one machine: what they are told, what is shown of them, and that none is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import sys
from pathlib import Path
from octavo.launch import local_processes
shown = {int(rank) for rank in sys.argv[2].split(",")}
print(local_processes.run(("-c", sys.argv[3]), 2, shown, Path(sys.argv[1])))
"""
PID = """
import os, time
from pathlib import Path
Path({folder!r}, os.environ["RANK"]).write_text(str(os.getpid()))
"""


@pytest.fixture
def begin(tmp_path):
    """Starts two processes that run `code`, of which those of `shown` are shown."""
    started = []

    def begin(code: str, shown: str = "0", **options: object) -> subprocess.Popen[str]:
        (tmp_path / "pids").mkdir()
        program = PID.format(folder=str(tmp_path / "pids")) + code
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), shown, program],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with process:
            process.kill()


def gone(folder: Path) -> bool:
    pids = [int(path.read_text()) for path in folder.iterdir()]
    return len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_each_is_told(begin, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OCTAVO_STORE")
    out, err = begin(f"print([os.environ[name] for name in {names}])", "0,1").communicate()
    assert err == ""
    assert sorted(out.splitlines()) == [
        *(f"[rank{rank}]:['{rank}', '{rank}', '2', '2', '{tmp_path}/store']" for rank in range(2)),
        "{}",
    ]


def test_output_comes_line_by_line_as_it_is_written(begin, tmp_path):
    code = (
        "import sys\n"
        "sys.stdout.write('a li'); time.sleep(0.3); sys.stdout.write('ne\\n')\n"
        "os.write(2, b'\\xff, and no end')\n"
        "while not os.path.exists('x'): time.sleep(0.05)\n"
    )
    process = begin(code, cwd=tmp_path)
    assert process.stdout.readline() == "[rank0]:a line\n"  # while it runs
    (tmp_path / "x").touch()
    out, err = process.communicate()
    assert (out, err) == ("{}\n", "[rank0]:\ufffd, and no end\n")
    hidden = tmp_path / "none_local" / "attempt_0" / "1"
    assert (hidden / "stdout.log").read_text() == "a line\n"


def test_one_that_fails_ends_the_others(begin, tmp_path):
    process = begin("if os.environ['RANK'] == '1': exit(9)\ntime.sleep(60)")
    assert process.communicate()[0] == f"{{1: (1, 9), 0: (0, {-signal.SIGTERM})}}\n"
    assert gone(tmp_path / "pids")


def test_training_goes_on_when_nobody_reads(begin, tmp_path):
    read, write = os.pipe()
    os.close(read)
    code = "for _ in range(3): print(1); time.sleep(0.2)\nPath('done' + os.environ['RANK']).touch()"
    process = begin(code, stdout=write, cwd=tmp_path)
    os.close(write)
    process.wait()
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]


def test_sigquit_ends_all_at_once(begin, tmp_path):
    process = begin("print(1, flush=True); time.sleep(60)", "0,1")
    assert {process.stdout.readline() for _ in range(2)} == {"[rank0]:1\n", "[rank1]:1\n"}
    process.send_signal(signal.SIGQUIT)
    process.communicate()
    assert process.returncode == 128 + signal.SIGQUIT
    assert gone(tmp_path / "pids")
