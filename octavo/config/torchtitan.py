"""Keys and values of torchtitan that octavo does not have, each with the reason.

Users of torchtitan bring their TOML files along. `torchtitan.toml` has what those hold; it is read only when
something was not understood.
"""

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KNOWN = "known to torchtitan, not supported: "


@functools.cache
def table() -> Mapping[str, Mapping[str, str]]:
    """Section -> key -> "same", or why the key is missing; also `sections` and `values` that are missing."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


def missing_key(section: str, key: str) -> str | None:
    """The message for a key that torchtitan has and octavo does not; None for any other."""
    first = key.partition(".")[0]  # sections within sections: training.dataloader.num_workers
    reason = table().get(section, {}).get(first) if section not in ("sections", "values") else None
    return missing_section(section) if reason in (None, "same") else _KNOWN + str(reason)


def missing_section(section: str) -> str | None:
    """The message for a section that torchtitan has and octavo does not; None for any other."""
    reason = table()["sections"].get(section)
    return None if reason is None else _KNOWN + reason


def has_keys_of(section: str) -> bool:
    """Whether each key of a section has a message of its own, though octavo has no such section."""
    return section in table() and section not in ("sections", "values")


def missing_value(name: str, value: Any) -> str:
    """To append to a message: why "section.key" cannot have a value that it has in torchtitan, or nothing."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    reasons = (table()["values"].get(f"{name} = {part.strip()}") for part in parts if isinstance(part, str))
    reason = next((reason for reason in reasons if reason), None)
    return "" if reason is None else f"; {_KNOWN}{reason}"
