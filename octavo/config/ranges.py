"""Which values an option can have: types for the fields of `schema.py`, with ranges in their annotations."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

_MOST = 2**31 - 1
"""The largest value of every integer but the seed. No job comes near it, and products of two fit in 64 bits.
"""

_STEEPEST = 1e3
"""The largest factor of a weight or its update per step: one step at this rate destroys any model."""

_UNCLIPPED = 1e30
"""A norm that never clips. Clipping divides it by as little as 1e-6, and float32 must hold the result."""


@dataclass(frozen=True)
class Range:
    """What a value must be, in the words of the message. None (unset) passes."""

    holds: Callable[[Any], bool]
    must: str


def at_least(low: int, why: str = "") -> Range:
    return Range(lambda value: low <= value <= _MOST, f"must be at least {low}{why} and at most {_MOST}")


def either(special: int, low: int, words: str) -> Range:
    """`special`, or a number from `low` up; `words` say so."""
    return Range(lambda value: value == special or low <= value <= _MOST, f"must be {words} at most {_MOST}")


def between(low: float, high: float, unit: str = "") -> Range:
    return Range(lambda value: low <= value <= high, f"must be {unit}between {low} and {high}")


def above_0(high: float) -> Range:
    return Range(lambda value: 0 < value <= high, f"must be a finite number above 0, at most {high:g}")


Positive = Annotated[int, at_least(1)]
Count = Annotated[int, at_least(0)]
Step = Annotated[int, either(-1, 0, "a step, or -1 for the latest, and")]
FromDevices = Annotated[int, either(-1, 1, "at least 1, or -1 to derive it from the number of devices, and")]
Batches = Annotated[int, either(-1, 1, "at least 1, or -1 for every sample once, and")]
Kept = Annotated[int, either(0, 2, "0 (keep all), or at least 2 (one remains while the next is written) and")]
Window = Annotated[int, at_least(5, ", for statistics,")]
Threads = Annotated[int, Range(lambda value: 0 <= value <= 64, "must be at least 0 and at most 64")]
Seed = Annotated[int, Range(lambda value: 0 <= value < 2**63, "must be between 0 and 2^63 - 1")]

Share = Annotated[float, between(0, 1)]
HeldOut = Annotated[float, between(0, 0.5)]
Percent = Annotated[float, between(0, 100, "a percentage, ")]
Decibels = Annotated[float, between(-100, 100, "decibels ")]
Rate = Annotated[float, above_0(_STEEPEST)]
Norm = Annotated[float, above_0(_UNCLIPPED)]
Decay = Annotated[float, Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")]
WeightDecay = Annotated[
    float,
    Range(
        lambda value: 0 <= value <= _STEEPEST,
        f"must be a finite number, at least 0 and at most {_STEEPEST:g}",
    ),
]

PathName = Annotated[
    str, Range(lambda value: "\0" not in value, "must not contain a NUL character: no path can")
]
"""A path; also a name that stands for one."""

Folder = Annotated[PathName, Range(lambda value: bool(value.strip()), "must not be empty")]
"""A path that has to be there, or to be made."""

LayerChoice = Annotated[
    str,
    Range(
        lambda value: value == "op" or re.fullmatch("0*[1-9][0-9]{0,5}", value) is not None,
        'must be "op" or a whole number from 1 to 999999, as a string',
    ),
]
