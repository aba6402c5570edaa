"""Reading a TOML file: strictly, and knowing on which line each key stands.

`tomllib` parses but forgets positions, and an error without a line number makes the user search.
`key_lines` recovers them: it feeds tomllib one statement at a time (the shortest run of lines that parses,
together with the table header above it), so that strings and arrays over several lines, dotted keys and
inline tables come out right without a second TOML parser. Its cost is one small parse a statement.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.config import lookup, torchtitan
from octavo.config.schema import SECTIONS
from octavo.config.values import BadValue, convert
from octavo.core.errors import ConfigError

_POSITION = re.compile(r"\s*\(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")


@dataclass(frozen=True)
class Entry:
    """One value from the file: where it belongs, what it is, and how to point at it."""

    section: str
    key: str
    value: Any
    written: str
    where: str


def read(path: str) -> tuple[list[Entry], list[str]]:
    """All valid entries of a file, and one message for each thing wrong in it.

    Raises:
        ConfigError: where the file cannot be read, or is no TOML.
    """
    text = _read_text(path)
    try:
        tree = tomllib.loads(text + "\n")  # so that an error in the last line has a line
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_message(path, text, str(error))) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets a thousand deep
        raise ConfigError(f"{path}: not usable TOML: {error}") from None
    lines = key_lines(text)
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for name, table in tree.items():
        section, where = lookup.normal(name), _where(path, lines, (name,))
        if not isinstance(table, dict):
            problems.append(f"{where}: {_not_a_table(name, section, table)}")
            continue
        if section not in SECTIONS and not (table and section in torchtitan.KEYS):
            problems.append(f"{where}: [{name}]: {lookup.explain_unknown_section(section)}")
            continue
        for key, value in table.items():
            try:
                entry = _entry(section, lookup.normal(key), value, where=_where(path, lines, (name, key)))
                if entry.written in entries:  # TOML itself does not know that - and _ are one to us
                    raise BadValue(f"given twice, here and at {entries[entry.written].where}")
                entries[entry.written] = entry
            except BadValue as error:
                spelling = f"{section}.{lookup.normal(key)}"
                problems.append(f"{_where(path, lines, (name, key))}: {spelling}: {error}")
    return list(entries.values()), problems


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line number (from 1) of every table and key, by its path: ("training",), ("training", "seq_len")."""
    found: dict[tuple[str, ...], int] = {}
    for line, tree in _statements(text):
        _record(tree, (), line, found)
    return found


def _statements(text: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Each header or assignment: the line it begins on, and what it says (None: it does not end)."""
    header, start = "", 0
    pending: list[str] = []
    for number, line in enumerate(_lines(text), 1):
        if not pending:
            start = number
            if not line.strip() or line.lstrip().startswith("#"):
                continue
        pending.append(line)
        statement = "\n".join(pending)
        is_header = statement.lstrip().startswith("[")
        try:
            tree = tomllib.loads(statement if is_header else f"{header}\n{statement}")
        except tomllib.TOMLDecodeError:
            continue  # a value that goes on in the next line
        pending, header = [], statement if is_header else header
        yield start, tree
    if pending:
        yield start, None


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n")


def _record(tree: Any, path: tuple[str, ...], line: int, found: dict[tuple[str, ...], int]) -> None:
    if isinstance(tree, list):
        tree = tree[0] if tree and isinstance(tree[0], dict) else None
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        found.setdefault((*path, key), line)
        _record(value, (*path, key), line, found)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file {path!r} is not UTF-8 text (byte {error.start}); is it a TOML file?"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def _syntax_message(path: str, text: str, error: str) -> str:
    match = _POSITION.search(error)
    what = error[: match.start()] if match else error
    what = what.replace("Cannot overwrite a value", "this key is given twice")
    if match is None or match["line"] is None:
        unclosed = max(line for line, _ in _statements(text))
        return f"{path}:{unclosed}: not valid TOML: {what}: what begins here does not end"
    line = int(match["line"])
    shown = _lines(text)[line - 1].strip()
    return f"{path}:{line}: not valid TOML at column {match['column']}: {what}: {shown!r}"


def _where(path: str, lines: dict[tuple[str, ...], int], key: tuple[str, ...]) -> str:
    return f"{path}:{lines[key]}" if key in lines else path


def _not_a_table(name: str, section: str, value: Any) -> str:
    if section in SECTIONS:
        return f"'{name}' is a section, not a key: write [{section}] on a line of its own and its keys below"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"[[{name}]] is an array of tables; sections have single brackets"
    if "." in name:
        return f"in quotes, the dot of '{name}' is part of a name; leave the quotes out"
    return f"key '{name}' stands outside any section{lookup.suggest_for_bare(section, prefix='')}"


def _entry(section: str, key: str, value: Any, *, where: str) -> Entry:
    """One key of the file; raises BadValue where it is no key of ours, or cannot have this value."""
    home = lookup.resolve(section, key)
    if home is None:
        raise BadValue(lookup.explain_unknown(section, key))
    if home == ("job", "config_file"):
        raise BadValue("a file cannot name another; give --job.config_file on the command line")
    converted = convert(SECTIONS[home[0]][home[1]], value, text=False)
    return Entry(*home, converted, f"{section}.{key}", where)
