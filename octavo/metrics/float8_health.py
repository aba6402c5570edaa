"""What float8 does to each layer, told while training: a file, curves, and warnings with their remedy.

`octavo.float8.health` defines and measures the numbers; here they are written to `health.jsonl`, one object
a step and cast, handed to the trackers, and held against the limits of `[float8]`. A layer beyond a limit is
named with what would help: another recipe, which is tried on the same tensors first, or high precision.

A run of thousands of steps must not repeat itself. A layer's operand is told of once, and again only when it
has become twice as bad. A measurement tells of the three worst, each in a line, and of the others in one,
which names them; several layers have one remedy together, which is told last. Trying other recipes costs a
forward and a backward in eager mode, for the worst layer alone, and happens at most once in ten measurements.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from octavo.config.schema import Float8
from octavo.core.logging import logger
from octavo.metrics.jsonl import Jsonl

_TOLD_AT_ONCE = 3
_MOST_NAMED = 24  # layers in a line: more than that is no matter of single layers
_BETWEEN_TRIALS = 10  # measurements


class HealthRow(Protocol):
    """One cast of one layer, as `octavo.float8.health.HealthRow`: shares are of 1, sqnr in decibels."""

    @property
    def layer(self) -> str: ...
    @property
    def recipe(self) -> str: ...
    @property
    def operand(self) -> str: ...
    @property
    def gemms(self) -> tuple[str, ...]: ...
    @property
    def values(self) -> int: ...
    @property
    def amax(self) -> float: ...
    @property
    def flushed(self) -> float: ...
    @property
    def saturated(self) -> float: ...
    @property
    def nonfinite(self) -> float: ...
    @property
    def sqnr(self) -> float: ...


@dataclass(frozen=True)
class Limit:
    """A number of a row that can be too bad. loss: how bad it is, growing. exceeded: whether it is too bad.
    shows: the number, with its unit; means: what it is.
    """

    name: str
    loss: Callable[[HealthRow], float]
    exceeded: Callable[[HealthRow, Float8], bool]
    shows: Callable[[HealthRow], str]
    means: str


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"


def _noise(row: HealthRow) -> float:
    """Noise over signal, as a ratio of amplitudes."""
    return math.inf if math.isnan(row.sqnr) else 10 ** (-row.sqnr / 20)


LIMITS = (
    Limit(
        "flushed",
        lambda row: row.flushed,
        lambda row, settings: 100 * row.flushed > settings.health_max_flushed,
        lambda row: _percent(row.flushed),
        "flushed to zero",
    ),
    Limit(
        "saturated",
        lambda row: row.saturated,
        lambda row, settings: 100 * row.saturated > settings.health_max_saturated,
        lambda row: _percent(row.saturated),
        "saturated",
    ),
    Limit(
        "sqnr",
        _noise,
        lambda row, settings: row.sqnr < settings.health_min_sqnr,
        lambda row: f"{row.sqnr:.1f} dB",
        "between values and rounding error",
    ),
)


@dataclass(frozen=True)
class HealthFinding:
    """A row beyond a limit."""

    row: HealthRow
    limit: Limit

    @property
    def key(self) -> tuple[str, str, str]:
        return self.row.layer, self.row.operand, self.limit.name


def findings(rows: Iterable[HealthRow], settings: Float8) -> list[HealthFinding]:
    """The operands beyond a limit, by the cast of each that is worst, the worst operand first. A row with
    values that are not finite is none: it is the guard's matter.
    """
    worst: dict[tuple[str, str, str], HealthFinding] = {}
    for row in rows:
        if row.nonfinite or not math.isfinite(row.amax):
            continue
        for limit in LIMITS:
            finding = HealthFinding(row, limit)
            before = worst.get(finding.key)
            if limit.exceeded(row, settings) and (before is None or limit.loss(row) > limit.loss(before.row)):
                worst[finding.key] = finding
    order = {limit.name: place for place, limit in enumerate(LIMITS)}
    return sorted(worst.values(), key=lambda f: (order[f.limit.name], -f.limit.loss(f.row)))


def curves(rows: Iterable[HealthRow]) -> dict[str, float]:
    """What trackers get: the worst cast of each layer's operand."""
    values: dict[str, float] = {}

    def keep(tag: str, value: float, pick: Callable[[float, float], float]) -> None:
        if math.isfinite(value):
            values[tag] = pick(values[tag], value) if tag in values else value

    for row in rows:
        place = f"float8_health/{row.layer}.{row.operand}"
        keep(f"{place}/amax", row.amax, max)
        keep(f"{place}/flushed(%)", 100 * row.flushed, max)
        keep(f"{place}/saturated(%)", 100 * row.saturated, max)
        keep(f"{place}/sqnr(dB)", row.sqnr, min)
    return values


class HealthReport:
    """Writes and judges measurements.

    Every process calls `judge` with the same rows, and so decides the same; only those with a `folder` write.
    """

    def __init__(self, settings: Float8, folder: Path | None):
        self._settings = settings
        self._jsonl = None if folder is None else Jsonl(folder / "health.jsonl")
        self._told: dict[tuple[str, str, str], float] = {}
        self._since_trial = _BETWEEN_TRIALS

    def start(self, step: int) -> None:
        """Training begins, or goes on, after `step`."""
        if self._jsonl:
            self._jsonl.start(step)

    def due(self, step: int) -> bool:
        """Whether `step` is measured."""
        every = self._settings.health_every
        return every > 0 and step % every == 0

    def write(self, step: int, rows: Sequence[HealthRow]) -> None:
        """Add one measurement to the file."""
        if self._jsonl:
            self._jsonl.write(*(_line(step, row) for row in rows))

    def judge(
        self,
        step: int,
        rows: Sequence[HealthRow],
        trial: Callable[[str], tuple[Sequence[HealthRow], Sequence[str]]],
    ) -> None:
        """Warn of what is beyond the limits and was not told.

        `trial(layer)` gives rows of that layer on the same tensors, in its own recipe and others, and the
        others by preference.
        """
        found = [f for f in findings(rows, self._settings) if self._is_news(f)]
        self._since_trial += 1
        if not found:
            return
        tried: tuple[Sequence[HealthRow], Sequence[str]] = ((), ())
        if self._since_trial > _BETWEEN_TRIALS:
            self._since_trial = 0
            tried = trial(found[0].row.layer)
        for finding in found:
            self._told[finding.key] = finding.limit.loss(finding.row)
        for number, finding in enumerate(found[:_TOLD_AT_ONCE]):
            better = self._better(finding, *tried) if number == 0 else None
            logger.warning("Step %d: %s", step, self._warning(finding, better))
        more = found[_TOLD_AT_ONCE:]
        if more:
            logger.warning("Step %d: and beyond the limits of [float8], too: %s", step, _listed(more))
        layers = list(dict.fromkeys(layer for layer, _, _ in self._told))
        if len(layers) > 1:
            logger.warning("Step %d: %s", step, self._together(layers))

    def _together(self, layers: Sequence[str]) -> str:
        """What would keep all of `layers` from losing so much."""
        if len(layers) > _MOST_NAMED:
            return (
                f"{len(layers)} layers are beyond the limits of [float8] by now: a finer recipe for all is "
                "the remedy, float8.recipe_name = rowwise or blockwise"
            )
        kept = ",".join([*self._settings.filter_fqns, *layers])
        return f"all {len(layers)} layers told of so far in high precision: --float8.filter_fqns={kept}"

    def _is_news(self, finding: HealthFinding) -> bool:
        told = self._told.get(finding.key)
        return told is None or finding.limit.loss(finding.row) > 2 * told

    def _better(
        self, finding: HealthFinding, rows: Sequence[HealthRow], others: Sequence[str]
    ) -> HealthRow | None:
        """The same cast in another recipe: the first that is within the limit, or else the best that loses
        less than half as much.
        """
        limit, own = finding.limit, finding.row
        same = {
            name: max(
                (
                    row
                    for row in rows
                    if (row.recipe, row.layer, row.operand) == (name, own.layer, own.operand)
                    and set(row.gemms) & set(own.gemms)
                ),
                key=limit.loss,
                default=None,
            )
            for name in others
        }
        candidates = [row for row in same.values() if row is not None]
        within = [row for row in candidates if not limit.exceeded(row, self._settings)]
        if within:
            return within[0]
        best = min(candidates, key=limit.loss, default=None)
        return best if best is not None and limit.loss(best) < limit.loss(own) / 2 else None

    def _warning(self, finding: HealthFinding, better: HealthRow | None) -> str:
        row, limit = finding.row, finding.limit
        kept = ",".join([*self._settings.filter_fqns, row.layer])
        high = f"keep this layer in high precision: --float8.filter_fqns={kept}"
        told = f"{row.layer} {row.operand}: {limit.shows(row)} {limit.means} in {row.recipe}"
        if better is None:
            return f"{told}; {high}"
        rules = ",".join([*self._settings.layer_recipes, f"{row.layer}={better.recipe}"])
        return (
            f"{told}; {better.recipe} gives {limit.shows(better)}: --float8.layer_recipes={rules}, or {high}"
        )


def _listed(found: Sequence[HealthFinding]) -> str:
    """`found` in a few words, by operand and limit: which layers, the worst first, and how bad each is."""
    groups: dict[tuple[str, str], list[HealthFinding]] = {}
    for finding in found:
        groups.setdefault((finding.row.operand, finding.limit.name), []).append(finding)
    told = []
    for (operand, _), each in groups.items():
        names = [f"{f.row.layer} {f.limit.shows(f.row)}" for f in each[:_MOST_NAMED]]
        rest = f" and {len(each) - _MOST_NAMED} more" if len(each) > _MOST_NAMED else ""
        told.append(f"{operand} {each[0].limit.means} in {', '.join(names)}{rest}")
    return f"{'; '.join(told)}. See health.jsonl"


def _line(step: int, row: HealthRow) -> Mapping[str, Any]:
    return {
        "step": step,
        "layer": row.layer,
        "operand": row.operand,
        "recipe": row.recipe,
        "gemms": list(row.gemms),
        "values": row.values,
        "amax": row.amax,
        "flushed": row.flushed,
        "saturated": row.saturated,
        "nonfinite": row.nonfinite,
        "sqnr": row.sqnr,
    }
