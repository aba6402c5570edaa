"""Text that is safe to show on a terminal, whatever the names in it are.

A name from a file (a TOML key, a tensor, a field of a record, a folder of another user) may hold escape
sequences, with which a terminal moves its cursor, hides text or answers as if the user had typed. They are
escaped once, where text leaves for a terminal or a log: in `Problem`, the log's formatter, the handler of
uncaught exceptions, and the commands that print such names themselves.
"""

import sys
import traceback
from types import TracebackType

from octavo.core.secrets import redact


def for_terminal(text: str) -> str:
    """`text` without access tokens; escapes replace what is not printable, a tab or a line end."""
    shown: str = redact(text)
    if shown.isprintable():
        return shown
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in shown
    )


def show_uncaught_safely() -> None:
    """From now on print the tracebacks of uncaught exceptions, which may quote the environment and files, as
    `for_terminal` shows them.
    """

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(for_terminal("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = show
