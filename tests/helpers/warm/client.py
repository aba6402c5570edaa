"""What stands in for Python: `client.py SOCKET ARGUMENT…` has the server run it; see `__init__.py`."""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

PASSED_ON = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCONT),
)

early = []  # signals that arrive before there is a process to take them
process = None


def pass_on(number, frame):
    if process is None:
        early.append(number)
    else:
        with suppress(ProcessLookupError):  # it has ended, and its code is on the way
            os.kill(process, number)


ignored = [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
for number in PASSED_ON:
    if number not in ignored:
        signal.signal(number, pass_on)

request = {
    "argv": sys.argv[2:],
    "environ": dict(os.environ),
    "cwd": os.getcwd(),
    "parent": os.getppid(),
    "ignored": ignored,
    "nice": os.nice(0),
}
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
data = json.dumps(request).encode()
socket.send_fds(connection, [len(data).to_bytes(4, "big")], [0, 1, 2])
connection.sendall(data)
answers = connection.makefile()
process = int(answers.readline())
for number in early:
    pass_on(number, None)
code = int(answers.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
