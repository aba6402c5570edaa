"""Standard streams that are there, whoever started the process."""

import os
import sys


def open_closed_streams() -> None:
    """Open standard input, output and error on /dev/null if they are closed, as under `command 2>&-`.

    Otherwise Python has None in place of a file, and the first file that is opened gets the number of
    standard error, so that what libraries print ends up in it. Call it before anything is opened.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115 - as long as Python
            setattr(sys, name, stream)
