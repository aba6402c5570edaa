"""Reading a TOML file: strictly, and knowing on which line each key is.

`tomllib` parses but forgets positions, and an error without a line number makes the user search.
`key_lines` recovers them: it splits the text into statements by looking for strings, brackets and comments
only, and has tomllib parse each once. Strings and arrays over several lines, dotted keys and inline tables
come out right without a second TOML parser, and the cost grows with the file's length, no faster.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.config import lookup, torchtitan
from octavo.config.schema import SECTIONS
from octavo.config.values import BadValue, Setting
from octavo.core.errors import ConfigError, Problem

_POSITION = re.compile(r"\s*\(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")


def read(path: str) -> tuple[list[Setting], list[Problem]]:
    """All valid settings of a file, and a problem for each thing wrong in it.

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
    settings: dict[str, Setting] = {}
    problems: list[Problem] = []

    def wrong(keys: tuple[str, ...], message: str, key: str = "") -> None:
        where = _where(path, lines, keys)
        problems.append(Problem(f"{where}: {message}", key=key, where=where))

    for name, table in tree.items():
        section = lookup.normal(name)
        if not isinstance(table, dict):
            wrong((name,), _not_a_table(name, section, table))
            continue
        if section not in SECTIONS and not (table and torchtitan.has_keys_of(section)):
            wrong((name,), f"[{name}]: {lookup.explain_unknown_section(section)}")
            continue
        for keys, value in _leaves(section, table):
            key = lookup.normal(".".join(keys))
            written = f"{section}.{key}"
            try:
                if written in settings:  # TOML itself does not know that - and _ are one to us
                    raise BadValue(f"given twice, here and at {settings[written].where}")
                settings[written] = _setting(section, key, value, _where(path, lines, (name, *keys)))
            except BadValue as error:
                wrong((name, *keys), f"{written}: {error}", written)
    return list(settings.values()), problems


def _leaves(section: str, table: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys of a section with their values; those of [quantize], which has sections, at any depth."""
    for key, value in table.items():
        if section == "quantize" and isinstance(value, dict):
            yield from (((key, *keys), inner) for keys, inner in _leaves(section, value))
        else:
            yield (key,), value


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line number (from 1) of every section and key: ("training",), ("training", "seq_len")."""
    found: dict[tuple[str, ...], int] = {}
    header: tuple[str, ...] = ()
    for line, statement in _statements(text):
        try:
            tree = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            header = _record(tree, (), line, found)
        else:
            _record(tree, header, line, found)
    return found


# What can open or close something that spans lines, or hide what looks like it.
_TOKENS = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\])*"|\'[^\']*\'|#.*|[\[\]{}]')
_CLOSE = {'"""': re.compile(r'(?:\\.|[^\\])*?"{3,5}', re.DOTALL), "'''": re.compile(r".*?'{3,5}", re.DOTALL)}


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each header or assignment: the line that it begins on, and its text, which may span lines."""
    pending: list[str] = []
    start, depth, quote = 0, 0, ""
    for number, line in enumerate(_lines(text), 1):
        if not pending:
            start = number
            if not line.strip() or line.lstrip().startswith("#"):
                continue
        pending.append(line)
        depth, quote = _scan(line, depth, quote)
        if depth <= 0 and not quote:
            yield start, "\n".join(pending)
            pending, depth = [], 0
    if pending:
        yield start, "\n".join(pending)


def _scan(line: str, depth: int, quote: str) -> tuple[int, str]:
    """How many brackets are open at the end of `line`, and which string of several lines, if any."""
    at = 0
    while True:
        if quote:
            end = _CLOSE[quote].match(line, at)
            if end is None:
                return depth, quote
            at, quote = end.end(), ""
        token = _TOKENS.search(line, at)
        if token is None:
            return depth, ""
        at = token.end()
        if token[0] in _CLOSE:
            quote = token[0]
        depth += (token[0] in "[{") - (token[0] in "]}")


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n")


def _record(
    tree: dict[str, Any], path: tuple[str, ...], line: int, found: dict[tuple[str, ...], int]
) -> tuple[str, ...]:
    """Note `line` for the keys of `tree` under `path`, down to four names. Returns the path of the last."""
    for key, value in tree.items() if len(path) < 4 else ():
        inner = (*path, key)
        found.setdefault(inner, line)
        if isinstance(value, list):
            value = value[0] if value else None
        path = _record(value, inner, line, found) if isinstance(value, dict) and value else inner
    return path


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


def _setting(section: str, key: str, value: Any, where: str) -> Setting:
    """One key of the file; raises BadValue where it is no key of ours, or cannot have this value."""
    home = lookup.resolve(section, key)
    if home is None:
        raise BadValue(lookup.explain_unknown(section, key))
    if home == ("job", "config_file"):
        raise BadValue("a file cannot name another; give --job.config_file on the command line")
    return Setting(*home, lookup.value_of(*home, value, text=False), f"{section}.{key}", where, "toml")
