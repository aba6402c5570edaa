"""The exception for a wrong configuration, and suggestions for misspelt names."""

import difflib
from collections.abc import Iterable

from octavo.core.secrets import redact


class ConfigError(Exception):
    """A configuration that cannot run. `str(error)` is the whole message, ready to print, with access tokens
    removed; the exit code is 2.
    """

    def __str__(self) -> str:
        text: str = redact(super().__str__())
        return text


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
