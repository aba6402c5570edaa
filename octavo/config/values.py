"""From what a user wrote to a typed value, by the same rules for TOML and for the command line.

TOML has types, a command line has text: `text=True` reads numbers and booleans out of a string, and there
`None` unsets an optional key. A list is a TOML list or, in both, one comma-separated string. Nothing is
guessed: `1.5` is no integer, `true` is no number, `"ten"` is neither.
"""

import math
import re
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from octavo.core.errors import did_you_mean

_INTEGER = re.compile(r"[+-]?[0-9](_?[0-9])*")
_NUMBER = re.compile(r"[+-]?(([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|inf|nan)", re.IGNORECASE)
_BOOLS = {"true": True, "false": False}
_SCALARS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_TOML_TYPES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


class BadValue(Exception):
    """A value that its key cannot take."""


@dataclass(frozen=True)
class Setting:
    """One value that a user gave.

    written: the spelling of the key, "section.key". where: the flag as typed, or "file.toml:12". source:
    "cli" or "toml". text: the value of a flag, as text.
    """

    section: str
    key: str
    value: Any
    written: str
    where: str
    source: str
    text: str = ""

    @property
    def name(self) -> str:
        """The option that it sets."""
        return f"{self.section}.{self.key}"

    @property
    def flag(self) -> str:
        """The flag, in the one spelling that scripts may rely on."""
        if isinstance(self.value, bool):
            return f"--{self.section}.{'' if self.value else 'no_'}{self.key}"
        return f"--{self.name}={self.text}"


def unwrap(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); any other type into (itself, False)."""
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = [arg for arg in get_args(kind) if arg is not type(None)]
        return inner, True
    return kind, False


def describe(kind: Any) -> str:
    """What a key of this type takes, in words: "an integer", "one of linear, sqrt, cosine"."""
    kind, _ = unwrap(kind)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        of = "strings" if item is str else ", ".join(get_args(item))
        return f"a list of {of} (or one comma-separated string)"
    return _SCALARS[kind]


def metavar(kind: Any) -> str:
    """How `--help` shows what follows the flag."""
    kind, _ = unwrap(kind)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is list:
        return "A,B,.."
    return str(kind.__name__).upper()


def convert(kind: Any, value: Any, *, text: bool) -> Any:
    """Read `value` as a key of type `kind`; `text` where it is a command line's string.

    Raises:
        BadValue: with what was expected and, for a choice, the nearest one.
    """
    kind, optional = unwrap(kind)
    if optional and text and value.lower() == "none":
        return None
    if get_origin(kind) is list:
        return _convert_list(kind, value)
    if get_origin(kind) is Literal:
        return _convert_choice(kind, value)
    converted = _read_text(kind, value) if text else _read_toml(kind, value)
    if converted is None:
        raise _wrong_type(kind, value, text=text)
    return converted


def shown(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return digits(value)
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)


def digits(number: int) -> str:
    """The number in digits, or its size where those would fill the line (and Python may refuse them)."""
    if number.bit_length() <= 128:
        return str(number)
    return f"about {'-' if number < 0 else ''}10^{int(number.bit_length() * math.log10(2))}"


def _convert_list(kind: Any, value: Any) -> list[str]:
    (item,) = get_args(kind)
    if isinstance(value, str):
        if value.strip()[:1] in ("[", "(", "{"):
            raise BadValue(f"got {_quoted(value)}; inside quotes a list is written without brackets: a,b")
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list):
        raise _wrong_type(kind, value, text=False)
    converted = [convert(item, part, text=False) for part in value]
    if len(set(converted)) < len(converted):
        twice = next(item for item in converted if converted.count(item) > 1)
        raise BadValue(f"names {_quoted(twice)} twice")
    return converted


def _convert_choice(kind: Any, value: Any) -> str:
    choices = get_args(kind)
    if not isinstance(value, str):
        raise _wrong_type(kind, value, text=False)
    if value not in choices:
        raise BadValue(f"{_quoted(value)} is not {describe(kind)}{did_you_mean(value, choices)}")
    return value


def _read_text(kind: Any, value: str) -> Any:
    try:
        if kind is int:
            return int(value) if _INTEGER.fullmatch(value) else None
        if kind is float:
            return float(value) if _NUMBER.fullmatch(value) else None
    except ValueError:
        return None
    if kind is bool:
        return _BOOLS.get(value.lower())
    return value


def _read_toml(kind: Any, value: Any) -> Any:
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return None
    return value if type(value) is kind else None


def _wrong_type(kind: Any, value: Any, *, text: bool) -> BadValue:
    got = _quoted(value) if text else f"{_TOML_TYPES.get(type(value), 'a date or time')} ({_quoted(value)})"
    return BadValue(f"expected {describe(kind)}, got {got}")


def _quoted(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return digits(value)
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
