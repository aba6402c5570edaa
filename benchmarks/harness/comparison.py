"""One comparison: several sides that do the same job, one of them the reference, and a control.

The control is the reference once more, under another name: the ratio of the two is 1 but for noise, and its
spread says which differences between the others mean anything. A side's speedup is the median over rounds of
the reference's time over its own in that round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.options import Options
from octavo.roofline.timing import Call, Spread, paired, time_in_turn

CONTROL = "control"


@dataclass
class Side:
    """One way to do the job: the call, what it should take (seconds, or None), and facts for the report."""

    call: Call | None
    predicted: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def spread_of(values: Spread, scale: float = 1.0) -> dict[str, Any]:
    """As it stands in the JSON."""
    first, third = values.quartiles
    named = {"median": values.median, "q1": first, "q3": third, "least": values.least, "most": values.most}
    return {name: value * scale for name, value in named.items()} | {"n": len(values.values)}


def compare(
    title: str,
    sides: Mapping[str, Side],
    options: Options,
    *,
    facts: Mapping[str, Any] | None = None,
    empty_cache: bool = True,
    warmup: int = 3,
) -> dict[str, Any]:
    """Time `sides` in turn; the first is the reference. The comparison as plain data, times in ms."""
    calls = {name: side.call for name, side in sides.items() if side.call is not None}
    times = time_in_turn(
        {**calls, CONTROL: next(iter(calls.values()))},
        options.device,
        rounds=options.rounds,
        warmup=warmup,
        empty_cache=empty_cache,
        until=options.budget.until,
    )
    return judge(title, sides, times, facts=facts)


def judge(
    title: str,
    sides: Mapping[str, Side],
    times: Mapping[str, Spread],
    *,
    facts: Mapping[str, Any] | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """The comparison that `times` (seconds by side, and `CONTROL`'s) make. The control is the first of
    `sides` once more, and that is the reference, too, unless another is named.
    """
    first = next(iter(sides))
    reference = reference or first
    control = paired(times[first].values, times[CONTROL].values)
    rows = {}
    for name, side in sides.items():
        speedup = paired(times[reference].values, times[name].values)
        seconds = times[name]
        rows[name] = {
            "ms": spread_of(seconds, 1e3),
            "samples_ms": [1e3 * value for value in seconds.values],
            "speedup": spread_of(speedup),
            "beyond_noise": name != reference and not control.least <= speedup.median <= control.most,
            **prediction(side.predicted, seconds.median),
            **side.facts,
        }
    return {
        "title": title,
        "reference": reference,
        "facts": dict(facts or {}),
        "sides": rows,
        "controlled": first,
        "control": spread_of(control),
    }


def prediction(predicted: float | None, measured: float) -> dict[str, float | None]:
    """Both in seconds, reported in ms; the ratio is measured / predicted."""
    if predicted is None:
        return {"predicted_ms": None, "measured_over_predicted": None}
    return {"predicted_ms": 1e3 * predicted, "measured_over_predicted": measured / predicted}


def predicted_only(
    title: str,
    sides: Mapping[str, float | None],
    facts: Mapping[str, Any] | None = None,
    *,
    reference: str | None = None,
) -> dict[str, Any]:
    """A comparison of predictions (seconds) alone, for `--predict`."""
    reference = reference or next(iter(sides))
    base = sides[reference]
    rows = {}
    for name, seconds in sides.items():
        known = seconds is not None and base is not None
        rows[name] = {
            "predicted_ms": None if seconds is None else 1e3 * seconds,
            "predicted_speedup": base / seconds if known else None,  # type: ignore[operator]
        }
    return {"title": title, "reference": reference, "facts": dict(facts or {}), "sides": rows}
