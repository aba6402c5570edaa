"""The syntax of `training.dataset`: one source, or several with weights.

    shakespeare                    a known corpus, a file or a folder
    books:0.7,/data/web:0.3        a mixture: NAME:WEIGHT, separated by commas

A path that exists is always one source, so a path with a comma or colon can be used alone but not in a
mixture. It is one string, so that TOML and flags write it the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from octavo.core.errors import ConfigError

_WEIGHTED = re.compile(r"\s*(?P<name>[^,]+?)\s*:\s*(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*")


def parse_dataset(text: str, known: Sequence[str]) -> list[tuple[str, float]]:
    """The name and weight of each source in `text`; a single source has weight 1.

    Args:
        known: the names of corpora that are not paths.

    Raises:
        ConfigError: a mixture with a part without a weight, a weight of 0, or a name that occurs twice.
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
