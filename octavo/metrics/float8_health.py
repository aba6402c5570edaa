"""Reports float8's numerical health during training: `health.jsonl`, tracker curves, and warnings.

`octavo.float8.health` defines and measures the numbers. This module writes them to `health.jsonl` (one object
per step and cast), passes them to the trackers, and compares them with the limits of `[float8]`. A warning
names the layer and a remedy: another recipe, which is tried on the same tensors first, or high precision.

Warnings do not repeat: each operand of a layer is reported once, and again only when its value has become
twice as bad. Each measurement logs one line for each of the three worst operands, one line that lists the
others, and last, if several layers are affected, one remedy for all of them. Trying other recipes costs an
eager forward and backward; it is done for the worst layer only, at most once in ten measurements.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from octavo.config.schema import Float8
from octavo.core.logging import logger
from octavo.metrics.jsonl import Jsonl

_WARNINGS_PER_STEP = 3
_MAX_NAMED = 24  # layers listed in one line; beyond that the problem is not in single layers
_BETWEEN_TRIALS = 10  # measurements


class HealthRow(Protocol):
    """One cast of a layer (see `octavo.float8.health.HealthRow`). Shares are in [0, 1], sqnr in decibels."""

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
    """A limit on one number of a row. loss: the number as a badness, larger is worse. exceeded: whether it is
    beyond the limit. shows: the number with its unit. means: what the number measures.
    """

    name: str
    loss: Callable[[HealthRow], float]
    exceeded: Callable[[HealthRow, Float8], bool]
    shows: Callable[[HealthRow], str]
    means: str


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"


def _noise(row: HealthRow) -> float:
    """Noise-to-signal ratio of amplitudes."""
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
    """The operands beyond a limit, each with its worst cast, the worst operand first. Rows with non-finite
    values are skipped; the non-finite guard handles those steps.
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
    """The values for the trackers: tag -> the worst value over the casts of that operand."""
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
    """Writes measurements and warns where they exceed the limits.

    Every process calls `judge` with the same rows and so takes the same decisions. Only processes with a
    `folder` write.
    """

    def __init__(self, settings: Float8, folder: Path | None):
        self._settings = settings
        self._jsonl = None if folder is None else Jsonl(folder / "health.jsonl")
        self._reported: dict[tuple[str, str, str], float] = {}
        self._since_trial = _BETWEEN_TRIALS

    def start(self, step: int) -> None:
        """Prepare for training to start or resume after `step`."""
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
        """Warn about operands that are beyond the limits and were not reported yet.

        `trial(layer)` measures that layer again on the same tensors. It returns the rows for its own recipe
        and the alternatives, and the names of the alternatives in order of preference.
        """
        new = [f for f in findings(rows, self._settings) if self._is_new(f)]
        self._since_trial += 1
        if not new:
            return
        tried: tuple[Sequence[HealthRow], Sequence[str]] = ((), ())
        if self._since_trial > _BETWEEN_TRIALS:
            self._since_trial = 0
            tried = trial(new[0].row.layer)
        for finding in new:
            self._reported[finding.key] = finding.limit.loss(finding.row)
        for number, finding in enumerate(new[:_WARNINGS_PER_STEP]):
            better = self._better(finding, *tried) if number == 0 else None
            logger.warning("Step %d: %s", step, self._warning(finding, better))
        more = new[_WARNINGS_PER_STEP:]
        if more:
            logger.warning("Step %d: also beyond the limits of [float8]: %s", step, _listed(more))
        layers = list(dict.fromkeys(layer for layer, _, _ in self._reported))
        if len(layers) > 1:
            logger.warning("Step %d: %s", step, self._joint_remedy(layers))

    def _joint_remedy(self, layers: Sequence[str]) -> str:
        """One remedy for all of `layers`."""
        if len(layers) > _MAX_NAMED:
            return (
                f"{len(layers)} layers are beyond the limits of [float8]; use a finer recipe for all of "
                "them: float8.recipe_name = rowwise or blockwise"
            )
        kept = ",".join([*self._settings.filter_fqns, *layers])
        return (
            f"to keep all {len(layers)} layers reported so far in high precision: --float8.filter_fqns={kept}"
        )

    def _is_new(self, finding: HealthFinding) -> bool:
        before = self._reported.get(finding.key)
        return before is None or finding.limit.loss(finding.row) > 2 * before

    def _better(
        self, finding: HealthFinding, rows: Sequence[HealthRow], others: Sequence[str]
    ) -> HealthRow | None:
        """The same cast in another recipe: the first within the limit, otherwise the best one if it halves
        the loss. None if there is no such recipe.
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
        problem = f"{row.layer} {row.operand}: {limit.shows(row)} {limit.means} in {row.recipe}"
        if better is None:
            return f"{problem}; {high}"
        rules = ",".join([*self._settings.layer_recipes, f"{row.layer}={better.recipe}"])
        gives = f"{better.recipe} gives {limit.shows(better)}"
        return f"{problem}; {gives}: --float8.layer_recipes={rules}, or {high}"


def _listed(more: Sequence[HealthFinding]) -> str:
    """One line that groups `more` by operand and limit, and lists each layer with its value."""
    groups: dict[tuple[str, str], list[HealthFinding]] = {}
    for finding in more:
        groups.setdefault((finding.row.operand, finding.limit.name), []).append(finding)
    parts = []
    for (operand, _), each in groups.items():
        names = [f"{f.row.layer} {f.limit.shows(f.row)}" for f in each[:_MAX_NAMED]]
        rest = f" and {len(each) - _MAX_NAMED} more" if len(each) > _MAX_NAMED else ""
        parts.append(f"{operand} {each[0].limit.means} in {', '.join(names)}{rest}")
    return f"{'; '.join(parts)}. See health.jsonl"


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
