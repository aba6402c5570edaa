"""Maps what a user wrote to an option and its value, or to the reason why there is none."""

from typing import Any

from octavo.config import torchtitan
from octavo.config.options import ValueSpelled
from octavo.config.schema import ALIASES, OPTIONS, SECTIONS
from octavo.config.values import BadValue, convert
from octavo.core.errors import nearest

_FLOAT8 = "linear.float8."  # [quantize.linear.float8]: torchtitan's name of [float8] since the end of 2025


def normal(name: str) -> str:
    """`name` with `_` for `-`: the two are the same in names."""
    return name.replace("-", "_")


def spellings(section: str) -> list[str]:
    """Every key that may be written in a section, including aliases."""
    return [*SECTIONS[section], *(key for alias_section, key in ALIASES if alias_section == section)]


def resolve(section: str, key: str) -> tuple[str, str] | None:
    """The (section, key) of the attribute that `section.key` sets, or None."""
    if section == "quantize" and key.startswith(_FLOAT8):
        return resolve("float8", key.removeprefix(_FLOAT8))
    if (section, key) in ALIASES:
        return ALIASES[section, key]
    return (section, key) if key in SECTIONS.get(section, ()) else None


def value_of(section: str, key: str, given: Any, *, text: bool) -> Any:
    """The value that a key has if a user gives `given`; `text` where it is a command line's string.

    Raises:
        BadValue: with what was expected.
    """
    option = OPTIONS[f"{section}.{key}"]
    for other in option.noted(ValueSpelled):
        given = other.translate(given)
    try:
        return convert(option.kind, given, text=text)
    except BadValue as error:
        raise BadValue(f"{error}{torchtitan.missing_value(option.name, given)}") from None


def explain_unknown(section: str, key: str, *, prefix: str = "") -> str:
    """Why there is no `section.key`; `prefix` is "--" if the user wrote a flag."""
    if section == "quantize" and key.startswith(_FLOAT8):
        return explain_unknown("float8", key.removeprefix(_FLOAT8), prefix=prefix)
    missing = torchtitan.missing_key(section, key)
    if missing is not None:
        return missing
    noun = "flag" if prefix else "key"
    if section not in SECTIONS:
        return f"unknown section '{section}'{_suggest(_everywhere(section, key), prefix)}"
    hint = _suggest(_in_section(section, key), prefix)
    if not hint and SECTIONS[section]:
        hint = f"; [{section}] has {', '.join(SECTIONS[section])}"
    return f"unknown {noun}{hint}"


def explain_unknown_section(section: str) -> str:
    """Why there is no `[section]`."""
    missing = torchtitan.missing_section(section)
    if missing is not None:
        return missing
    best = nearest(section, SECTIONS)
    return "unknown section" + (
        f"; did you mean [{best}]?" if best else f"; the sections are {', '.join(SECTIONS)}"
    )


def suggest_for_bare(key: str, *, prefix: str = "") -> str:
    """A suggestion for a key written without a section: the section of this key, or of the nearest one."""
    joined = {f"{section}_{name}": f"{section}.{name}" for section in SECTIONS for name in spellings(section)}
    places = _sections_with(key) or _sections_with(nearest(key, _all_keys()) or "")
    whole = nearest(normal(key).replace(".", "_"), joined, cutoff=0.85)  # --training-steps
    return _suggest([joined[whole]] if whole else places, prefix)


def _in_section(section: str, key: str) -> list[str]:
    best = nearest(key, spellings(section))
    places = _sections_with(key) or (
        [] if best else _sections_with(nearest(key, _all_keys(), cutoff=0.8) or "")
    )
    if len(places) == 1:  # a key of several sections, such as `enable`, does not show which was meant
        return places
    return [f"{section}.{best}"] if best else []


def _everywhere(section: str, key: str) -> list[str]:
    best = nearest(section, SECTIONS)
    found = nearest(key, spellings(best)) if best else None
    return [f"{best}.{found}"] if found else _sections_with(key)


def _sections_with(key: str) -> list[str]:
    """The same key in other sections, e.g. warmup_steps written under [training]."""
    found = [f"{section}.{key}" for section in SECTIONS if key in spellings(section)]
    if f"training.{key}" in found:  # [validation] repeats keys of [training]
        return [place for place in found if place != f"validation.{key}"]
    return found


def _all_keys() -> list[str]:
    return [key for section in SECTIONS for key in spellings(section)]


def _suggest(names: list[str], prefix: str) -> str:
    if not names:
        return ""
    return "; did you mean " + " or ".join(f"'{prefix}{name}'" for name in names[:3]) + "?"
