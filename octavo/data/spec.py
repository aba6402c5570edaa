"""How `training.dataset` names its sources: one, or several with weights.

    shakespeare                    a known corpus, a file or a folder
    books:0.7,/data/web:0.3        a mixture: NAME:WEIGHT, separated by commas

What exists under the whole text is that one thing, so a path with a comma or a colon in it can be used alone,
but not in a mixture. One string, so that TOML and a flag write it alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from octavo.core.errors import ConfigError

_WEIGHTED = re.compile(r"\s*(?P<name>[^,]+?)\s*:\s*(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*")


def parse_dataset(text: str, known: Sequence[str]) -> list[tuple[str, float]]:
    """Name and weight of each source that `text` names; one that stands alone has the weight 1.

    Args:
        known: the names of corpora that are no paths.

    Raises:
        ConfigError: a mixture with a part without weight, a weight of 0, or a name that occurs twice.
    """
    if text in known or Path(text).expanduser().exists():
        return [(text, 1.0)]
    parts = text.split(",")
    matches = [_WEIGHTED.fullmatch(part) for part in parts]
    if not any(matches):
        return [(text, 1.0)]
    sources: list[tuple[str, float]] = []
    for part, match in zip(parts, matches, strict=True):
        if match is None:
            raise ConfigError(f"{part.strip()!r} has no weight; a mixture is written NAME:WEIGHT,NAME:WEIGHT")
        try:
            weight = float(match["weight"])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ConfigError(f"the weight {match['weight']!r} of {match['name']} must be a number above 0")
        if match["name"] in dict(sources):
            raise ConfigError(f"{match['name']} occurs twice in a mixture; add its weights up")
        sources.append((match["name"], weight))
    return sources
