"""The command line: `--section.key value`, in every accepted spelling.

`-` and `_` are the same; `--x.y=value`; booleans as `--x.y`, `--x.no-y`, `--no-x.y`, `--x.y=false`; second
spellings of keys; values that begin with a dash, unless they are flags themselves. For an unknown flag the
nearest name is suggested.
"""

from collections.abc import Iterator, Sequence

from octavo.config import lookup
from octavo.config.schema import SECTIONS
from octavo.config.values import BadValue, Setting
from octavo.core.errors import Problem

_CONFIG_FILE = ("job", "config_file")
_HELP = ("-h", "--help")


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return any(token in _HELP for token in argv)


def read(argv: Sequence[str]) -> tuple[list[Setting], list[Problem]]:
    """The settings in the order of their flags, and a problem for each flag that is none or has a wrong
    value.
    """
    settings: list[Setting] = []
    problems: list[Problem] = []
    for typed, text in _flags(argv, problems):
        written, negated = _resolve(typed)
        home = lookup.resolve(*written) if written else None
        try:
            if written is None or home is None:
                raise BadValue(_explain(typed))
            if text is None:
                raise BadValue("needs a value")
            value = lookup.value_of(*home, text, text=True)
            settings.append(
                Setting(*home, not value if negated else value, ".".join(written), typed, "cli", text)
            )
        except BadValue as error:
            problems.append(Problem(f"{typed}: {error}", key=".".join(home or ()), where=typed))
    return settings, problems


def config_file(settings: Sequence[Setting]) -> Setting | None:
    """The last flag that names the TOML file, or None."""
    named = [setting for setting in settings if (setting.section, setting.key) == _CONFIG_FILE]
    return named[-1] if named else None


def _flags(argv: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, str | None]]:
    """Each flag as typed, with the text of its value or None. Other tokens become `problems`."""
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        typed, equals, text = token.partition("=")
        if not typed.startswith("--") or typed == "--":
            remedy = "flags look like --section.key value (quote spaces)"
            problems.append(Problem(f"unexpected argument {token!r}", remedy, where=token))
        elif equals:
            yield typed, text
        elif _is_bool(typed):
            yield typed, rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif rest and not _begins_flag(rest[0], after=typed):
            yield typed, rest.pop(0)
        else:
            yield typed, None


def _is_bool(typed: str) -> bool:
    written, _ = _resolve(typed)
    home = lookup.resolve(*written) if written else None
    return home is not None and SECTIONS[home[0]][home[1]] is bool


def _begins_flag(token: str, *, after: str) -> bool:
    """Whether `token` is a flag rather than the value of the flag `after`. What follows an unknown flag is
    its value unless it looks like a flag, so that one mistake is one error.
    """
    if _resolve(after)[0] is None:
        return token.startswith("--")
    return token.startswith("--") and _resolve(token.partition("=")[0])[0] is not None


def _resolve(typed: str) -> tuple[tuple[str, str] | None, bool]:
    """The (section, key) of a flag, or None if it names no key; whether it is the `no` form of a boolean."""
    name = lookup.normal(typed[2:])
    if name == "config_file":
        return _CONFIG_FILE, False
    section, _, key = name.partition(".")
    if lookup.resolve(section, key) is not None:
        return (section, key), False
    for positive in ((section, key.removeprefix("no_")), (section.removeprefix("no_"), key)):
        home = lookup.resolve(*positive)
        if home is not None and SECTIONS[home[0]][home[1]] is bool:
            return positive, True
    return None, False


def _explain(typed: str) -> str:
    section, dot, key = lookup.normal(typed[2:]).partition(".")
    if not dot:
        return f"unknown flag{lookup.suggest_for_bare(section, prefix='--')}"
    bare = (section, key.removeprefix("no_"))
    if section.startswith("no_"):
        bare = (section.removeprefix("no_"), key)
    if lookup.resolve(*bare) is not None:
        return f"not a boolean, so it has no 'no' form; write --{bare[0]}.{bare[1]} VALUE"
    return lookup.explain_unknown(section, key, prefix="--")
