"""From the name a user wrote to the attribute that holds it, or to the reason why there is none."""

from octavo.config import torchtitan
from octavo.config.schema import ALIASES, SECTIONS
from octavo.core.errors import nearest


def normal(name: str) -> str:
    """`-` and `_` are one character to us."""
    return name.replace("-", "_")


def spellings(section: str) -> list[str]:
    """Every key that may be written in a section, second spellings included."""
    return [*SECTIONS[section], *(key for alias_section, key in ALIASES if alias_section == section)]


def resolve(section: str, key: str) -> tuple[str, str] | None:
    """The (section, key) that holds what is written as `section.key`; None where nothing does."""
    if (section, key) in ALIASES:
        return ALIASES[section, key]
    return (section, key) if key in SECTIONS.get(section, ()) else None


def explain_unknown(section: str, key: str, *, prefix: str = "") -> str:
    """Why `section.key` is no key of ours; `prefix` is "--" where the user wrote a flag."""
    reason = torchtitan.reason(section, key)
    if reason is not None:
        return f"known to torchtitan, not supported: {reason}"
    noun = "flag" if prefix else "key"
    if section not in SECTIONS:
        return f"unknown section '{section}'{_suggest(_everywhere(section, key), prefix)}"
    hint = _suggest(_in_section(section, key), prefix)
    if not hint and SECTIONS[section]:
        hint = f"; [{section}] has {', '.join(SECTIONS[section])}"
    return f"unknown {noun}{hint}"


def explain_unknown_section(section: str) -> str:
    """Why `[section]` is no section of ours."""
    reason = torchtitan.section_reason(section)
    if reason is not None:
        return f"known to torchtitan, not supported: {reason}"
    best = nearest(section, SECTIONS)
    return "unknown section" + (
        f"; did you mean [{best}]?" if best else f"; the sections are {', '.join(SECTIONS)}"
    )


def suggest_for_bare(key: str, *, prefix: str = "") -> str:
    """For a key written without a section: where this key, or the nearest one, belongs."""
    joined = {f"{section}_{name}": f"{section}.{name}" for section in SECTIONS for name in spellings(section)}
    homes = _homes(key) or _homes(nearest(key, _all_keys()) or "")
    whole = nearest(normal(key).replace(".", "_"), joined, cutoff=0.85)  # --training-steps
    return _suggest([joined[whole]] if whole else homes, prefix)


def _in_section(section: str, key: str) -> list[str]:
    best = nearest(key, spellings(section))
    elsewhere = _homes(key) or ([] if best else _homes(nearest(key, _all_keys(), cutoff=0.8) or ""))
    if len(elsewhere) == 1:  # `enable`, which several sections have, says nothing about which was meant
        return elsewhere
    return [f"{section}.{best}"] if best else []


def _everywhere(section: str, key: str) -> list[str]:
    best = nearest(section, SECTIONS)
    found = nearest(key, spellings(best)) if best else None
    return [f"{best}.{found}"] if found else _homes(key)


def _homes(key: str) -> list[str]:
    """The same key in other sections, e.g. warmup_steps written under [training]."""
    found = [f"{section}.{key}" for section in SECTIONS if key in spellings(section)]
    if f"training.{key}" in found:  # validation has training's keys once more
        return [home for home in found if home != f"validation.{key}"]
    return found


def _all_keys() -> list[str]:
    return [key for section in SECTIONS for key in spellings(section)]


def _suggest(names: list[str], prefix: str) -> str:
    if not names:
        return ""
    return "; did you mean " + " or ".join(f"'{prefix}{name}'" for name in names[:3]) + "?"
