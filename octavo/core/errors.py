"""The exception for a wrong configuration, and suggestions for misspelt names."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.core.terminal import for_terminal


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    message: what is wrong, with the value and the limit. remedy: what to do; empty where the message says it.
    key: the option at fault as "section.key", if any. where: the flag as typed, or "file.toml:12"; empty for
    a default. valid: the option itself is right, and `remedy` is the command that provides what is missing.
    """

    message: str
    remedy: str = ""
    key: str = ""
    where: str = ""
    valid: bool = False

    def __str__(self) -> str:
        joint = ": " if self.valid else "; "
        return for_terminal(f"{self.message}{joint}{self.remedy}" if self.remedy else self.message)


class ConfigError(Exception):
    """A configuration that cannot run. `str(error)` is the whole message, ready to print, a line for each of
    `problems`, without access tokens and control characters; the exit code is 2.
    """

    def __init__(self, problems: str | Iterable[Problem]) -> None:
        self.problems = (Problem(problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def nearest(name: str, valid: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The valid name closest to `name`, ignoring case, or None where nothing is close.

    `cutoff` is the least similarity, 0 to 1, that counts as close (as `difflib` measures it).
    """
    by_lower = {candidate.lower(): candidate for candidate in valid}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, valid: Iterable[str], *, prefix: str = "") -> str:
    """A sentence to append to a message: ``; did you mean 'rowwise'?`` or nothing."""
    best = nearest(name, valid)
    return "" if best is None else f"; did you mean '{prefix}{best}'?"
