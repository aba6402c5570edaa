"""How processes end: exit codes, last words and signals, with a script of ours in place of octavo.train."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from octavo.launch import elastic, status, supervisor
from octavo.launch.supervisor import Supervisor
from tests.helpers import warm
from tests.helpers.waiting import LIMIT, wait_for, wait_for_text

DRIVER = """
import dataclasses, os, sys
from octavo.launch import launcher, supervisor
planned = launcher.plan([], os.environ, gpus=0, cores=2)
sys.exit(launcher.run(dataclasses.replace(planned, command=tuple(sys.argv[1:]))))
"""

TRAINING = """
import os, signal, sys, time
from pathlib import Path
from octavo.launch.status import StatusFile, read_all

def leave(number, frame):
    time.sleep(1.5)  # a save
    status.write(7, ended=True)
    sys.exit(75)

def wait_for_all(step):
    while sum(one.step >= step for one in read_all(folder)) < int(os.environ["LOCAL_WORLD_SIZE"]):
        time.sleep(0.02)

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = Path(os.environ["OCTAVO_STATUS"])
status = StatusFile(folder, rank)
if sys.argv[1] == "save":
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR1, leave)
if sys.argv[1] in ("hang", "deaf"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
status.write(0)
wait_for_all(0)  # so that who reads this line may send each a signal
print(f"rank {rank} of {world}")  # not flushed, as in code of a user's
status.write(7)
match sys.argv[1], rank:
    case "fail", 1:
        wait_for_all(7)  # until the other has printed its line
        print("the reason", file=sys.stderr)
        sys.exit(9)
    case "hang", 1:
        os._exit(0)
    case "misuse", _:
        print("octavo: what is wrong", file=sys.stderr)
        status.write(8)
        wait_for_all(8)  # none is ended before it has said so
        if rank == 0:
            time.sleep(0.5)  # the hidden one is the first that the launcher sees
        status.write(8, ended=True)
        sys.exit(2)
    case "die", 1:
        os.kill(os.getpid(), signal.SIGKILL)
    case "finish", _:
        sys.exit(0)
time.sleep(1000)  # longer than a test waits: somebody has to end it
"""


@pytest.fixture
def begin(tmp_path):
    script, temporary = tmp_path / "training.py", tmp_path / "tmp"
    script.write_text(TRAINING)
    temporary.mkdir()
    started = []

    def begin(what: str, *, python: str | None = None, **environ: str) -> subprocess.Popen[str]:
        # Lines are to come while training runs without this variable too.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        process = subprocess.Popen(
            [python or warm.python(), "-c", DRIVER, str(script), what],
            env={**inherited, "NGPU": "2", "TMPDIR": str(temporary), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def kept_logs(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "tmp").glob("octavo-logs-*"))


def test_the_exit_code_and_the_last_words_of_a_failed_process_come_through(begin, tmp_path):
    process = begin("fail", python=sys.executable)
    out, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 1, err  # 9 is not what it said, but what it left with
    assert out == "[rank0]:rank 0 of 2\n"
    (logs,) = kept_logs(tmp_path)
    assert err == (
        f"[rank1]:the reason\noctavo: rank 1 ended with exit code 9 in step 7; output of all ranks: {logs}\n"
    )


def test_exit_code_2_needs_no_words_of_ours(begin, tmp_path):
    process = begin("misuse")
    _, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 2
    assert err == "[rank0]:octavo: what is wrong\n"
    assert kept_logs(tmp_path) == []


def test_what_a_hidden_process_alone_has_found_is_shown(tmp_path):
    for rank, text in enumerate(["[octavo] a log\noctavo: this\n", "octavo: this\n", "octavo: that\n", ""]):
        file = tmp_path / "none_1" / "attempt_0" / str(rank) / "stderr.log"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    assert [elastic._reason_is_shown(tmp_path, rank, {0}) for rank in range(1, 4)] == [True, False, False]


STOPPED = """
import faulthandler, os, signal, sys, time
from pathlib import Path
from octavo.launch.status import StatusFile, stacks_path
folder = Path(sys.argv[1])
faulthandler.register(signal.SIGUSR2, stacks_path(folder, 1).open("w"))
StatusFile(folder, 1).write(7)
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1000)
"""


def test_a_stopped_process_leaves_its_stacks_and_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "GRACE", 0.1)
    status.StatusFile(tmp_path, 0).write(7, ended=True)
    # not in `with`, which would take the test's signals
    with subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], start_new_session=True) as stopped:
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        watching = supervisor.Supervisor(tmp_path)

        def wait(seconds):
            if watching.killed:  # for its stacks it has as long as it needs on a busy machine
                wait_for_text(status.stacks_path(tmp_path, 1), 'File "<string>", line 8')

        monkeypatch.setattr(watching._over, "wait", wait)
        try:
            watching._end_the_rest()
            assert stopped.wait(timeout=LIMIT) == -signal.SIGKILL
        finally:
            stopped.kill()
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/rank1.txt").symlink_to(tmp_path / "elsewhere")
    ended = "octavo: rank 0 ended with exit code 1 in step 7"
    elastic._report_failure(ended, 0, watching.statuses(), watching.killed, tmp_path, tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    assert capsys.readouterr().err == (
        "octavo: rank 0 ended with exit code 1 in step 7; still running and killed: rank 1 in step 7; "
        f"Python stacks: {tmp_path / 'stacks'} (none of rank 0); output of all ranks: {tmp_path}\n"
    )
    assert 'File "<string>", line 8' in (tmp_path / "stacks" / "rank1.txt").read_text()


@pytest.mark.parametrize(
    ("said", "seen", "killed", "failures", "culprit"),
    [
        ({0: "follows", 1: "silent"}, [], [], [0, 1], 1),  # torchrun saw both at once
        ({0: "follows", 1: "silent"}, [], [], [0], 1),  # 1 left with code 0, and nobody saw it
        ({0: "follows", 1: "silent"}, [1], [], [0], 1),
        ({0: "follows", 1: "ended"}, [], [], [0, 1], 1),
        ({0: "follows", 1: "silent"}, [], [1], [0], 0),  # 1 hung, and we killed it
        ({0: "follows", 1: "silent"}, [], [1], [0, 1], 0),
        ({0: "silent", 1: "ended"}, [], [], [1], 1),  # 0 was ended by torchrun
        ({0: "ended", 1: "silent"}, [1], [], [0], 1),  # 0 missed 1, and failed in its own way
        ({0: "follows", 1: "follows"}, [], [], [1, 0], 1),  # another machine's
        ({}, [], [], [1, 0], 1),  # before any had begun
    ],
)
def test_who_was_first(said, seen, killed, failures, culprit, tmp_path):
    for rank, word in said.items():
        status.StatusFile(tmp_path, rank).write(3, ended=word != "silent", follows=word == "follows")
    everyone = status.read_all(tmp_path)
    watching = supervisor.Supervisor(tmp_path)
    watching.deaths = [everyone[rank] for rank in seen]
    watching.killed = [everyone[rank] for rank in killed]
    assert elastic._first_failed_rank(failures, watching, everyone) == culprit


def test_a_killed_process_is_told(begin):
    process = begin("die")
    _, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 ended with signal 9 (out of memory?) in step 7" in err


def test_a_process_that_goes_without_a_word_ends_the_others_within_10_s(begin):
    looks = 1 + 2 + 1  # until it is missed, until the others are asked, after their grace
    assert looks * supervisor._CHECK_EVERY + supervisor.GRACE + supervisor._STACKS_WITHIN < 10

    process = begin("hang")
    _, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 1
    assert "octavo: rank 1 ended with exit code 0 before the run was over in step 7; " in err
    assert "still running and killed: rank 0 in step 7; " in err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_saving_waited_for(begin, sent, tmp_path):
    process = begin("save")
    process.stdout.readline()
    process.send_signal(sent)
    first = process.stderr.readline()  # it is passed on
    process.send_signal(sent)
    process.send_signal(signal.SIGTERM)  # which must not end a save either
    _, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 75
    assert first + err == f"octavo: {sent.name}: training stops after this step\n"
    assert kept_logs(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")
def test_a_tmp_that_was_cleaned_during_the_run_hides_no_exit_code(begin):
    process = begin("save", python=sys.executable)
    process.stdout.readline()

    def seen() -> list[str]:
        opened = map(os.path.realpath, Path(f"/proc/{process.pid}/fd").iterdir())
        return [path for path in opened if path.endswith(".status")]

    wait_for("the launcher to see both processes", lambda: len(seen()) == 2)
    shutil.rmtree(Path(seen()[0]).parent)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 75
    assert err == "octavo: SIGTERM: training stops after this step\n"


def test_a_second_ctrl_c_ends_at_once(begin, tmp_path):
    process = begin("deaf")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends it at once" in process.stderr.readline()
    time.sleep(supervisor._SECOND_SIGNAL_AFTER)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 130
    assert err.startswith("octavo: a second Ctrl-C: ending at once")
    assert kept_logs(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training(begin, sent, tmp_path):
    process = begin("run")
    assert process.stdout.readline() == "[rank0]:rank 0 of 2\n"
    process.send_signal(sent)
    _, err = process.communicate(timeout=LIMIT)

    assert process.returncode == 128 + sent
    assert not re.search("^Traceback", err, flags=re.MULTILINE)
    assert kept_logs(tmp_path) == []


@pytest.mark.parametrize("ordered", [False, True])
def test_two_machines_meet(begin, ordered, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environ = {"NNODES": "2", "NGPU": "1", "RDZV_ENDPOINT": f"localhost:{port}"}
    machines = [begin("finish", **environ, **({"NODE_RANK": str(n)} if ordered else {})) for n in range(2)]
    ended = [(*machine.communicate(timeout=LIMIT), machine.returncode) for machine in machines]

    assert [code for _, _, code in ended] == [0, 0], ended
    ranks = [re.findall(r"rank (\d) of 2", out) for out, _, _ in ended]
    assert sorted(ranks) == [["0"], ["1"]]
    assert ranks == sorted(ranks) or not ordered


@pytest.mark.parametrize("cause", ["signal", "limit"])
def test_waiting_for_other_machines_ends_though_the_store_hears_nothing(tmp_path, monkeypatch, cause):
    """The port is another service's, so the store's C++ code waits for a greeting and handles no signal."""
    from torch.distributed import TCPStore

    monkeypatch.setattr("octavo.launch.supervisor._OVERTIME", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        pid = os.fork()
        if not pid:
            try:
                signal.alarm(20)  # ends this process if nothing else does
                with Supervisor(tmp_path, 60.0 if cause == "signal" else 0.5):
                    waits = timedelta(seconds=60)
                    TCPStore("127.0.0.1", other.getsockname()[1], is_master=False, timeout=waits)
            finally:
                os._exit(99)
        with other.accept()[0]:  # and never answer
            if cause == "signal":
                time.sleep(0.3)
                os.kill(pid, signal.SIGTERM)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (128 + signal.SIGTERM if cause == "signal" else 1)
