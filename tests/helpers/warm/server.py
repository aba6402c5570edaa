"""The process that forks: `server.py SOCKET PROGRAM`; see `__init__.py`."""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path

LOADED = (
    *("numpy", "tokenizers", "torch"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.pipelining"),
    *("torch.distributed.run", "torch.distributed.tensor.parallel"),
)


class Started(Exception):
    """Raised in the forked process, with the request, to leave the server's loop."""


class Server:
    """Forks one process for each connection, tells its number and in the end its exit code (negative: the
    signal), and kills it when the connection is closed first.
    """

    def __init__(self, path: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, tuple[socket.socket, int]] = {}  # process -> connection, pidfd
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(64)
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._end)

    def serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _accept(self) -> None:
        connection, _ = self._socket.accept()
        length, files, _, _ = socket.recv_fds(connection, 4, 3)
        data = b""
        while len(data) < int.from_bytes(length, "big"):
            data += connection.recv(1 << 20)
        process = os.fork()
        if process == 0:
            self._leave_to(files)
            raise Started(json.loads(data))
        for file in files:
            os.close(file)
        connection.sendall(f"{process}\n".encode())
        ended = os.pidfd_open(process)
        self._connections[process] = connection, ended
        self._selector.register(ended, selectors.EVENT_READ, lambda: self._tell(process))
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._kill(process))

    def _leave_to(self, files: list[int]) -> None:
        """In the forked process: none of the server's files, and those of the client as the standard ones."""
        self._selector.close()
        self._socket.close()
        for connection, ended in self._connections.values():
            connection.close()
            os.close(ended)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)

    def _kill(self, process: int) -> None:
        """With what it has started in its group, as one does who kills a whole group."""
        if process in self._connections:
            with suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(process, signal.SIGKILL)
            os.kill(process, signal.SIGKILL)

    def _tell(self, process: int) -> None:
        if process not in self._connections:
            return
        _, status = os.waitpid(process, 0)
        connection, ended = self._connections.pop(process)
        for file in (connection, ended):
            self._selector.unregister(file)
        with suppress(OSError):  # the client was killed
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        connection.close()
        os.close(ended)

    def _end(self) -> None:
        for process in self._connections:
            self._kill(process)
        os._exit(0)


def become(request: dict, program: str) -> list[str]:
    """Make this process what a Python started with the request's arguments would be; returns what it is to
    run: ["-c", code], ["-m", module] or [script].
    """
    os.setsid()
    os.chdir(request["cwd"])
    os.nice(request["nice"] - os.nice(0))
    os.environ.clear()
    os.environ.update(request["environ"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.getppid = lambda: request["parent"]
    sys.executable = program

    words, options = list(request["argv"]), ""
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):
        options += words.pop(0)[1:]
    unknown = set(options) - set("uP")
    assert not unknown, f"no stand-in for Python's options {unknown}"
    run, rest = (words[:2], words[2:]) if words[0] in ("-c", "-m") else (words[:1], words[1:])
    sys.argv = [run[0], *rest]
    first = [] if "P" in options or os.environ.get("PYTHONSAFEPATH") else [start_of_path(run)]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = [path for path in sys.path if path not in INHERITED]
    sys.path[:] = [*first, *dict.fromkeys([*given, *own])]
    importlib.invalidate_caches()
    sys.path_importer_cache.clear()

    unbuffered = "u" in options or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=unbuffered or sys.stdout.isatty(), write_through=unbuffered)
    threads = os.environ.get("OMP_NUM_THREADS")
    sys.modules["torch"].set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))
    return run


def start_of_path(run: list[str]) -> str:
    if run[0] == "-c":
        return ""
    return os.getcwd() if run[0] == "-m" else str(Path(run[0]).resolve().parent)


def execute(run: list[str]) -> None:
    if run[0] == "-m":
        runpy.run_module(run[1], run_name="__main__", alter_sys=True)
    elif run[0] == "-c":
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(run[1], "<string>", "exec"), main.__dict__)
    else:
        main = types.ModuleType("__main__")
        main.__file__ = os.path.abspath(run[0])
        sys.modules["__main__"] = main
        exec(compile(Path(run[0]).read_bytes(), run[0], "exec"), main.__dict__)


def exit_code_of(run: list[str]) -> int:
    """The code that Python would leave with."""
    try:
        execute(run)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


for name in LOADED:
    importlib.import_module(name)
# What this process has on its path and another Python would not.
INHERITED = {path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
gc.collect()
gc.freeze()
try:
    server = Server(sys.argv[1])
    print("ready", flush=True)
    server.serve()
except Started as started:
    wanted = started.args[0]
what = become(wanted, sys.argv[2])
code = exit_code_of(what)
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
