"""A run's verdict: inside or outside the noise of the baseline, or not judged, and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from octavo.commands.compare.report import noise
from octavo.commands.compare.report.run_data import RunData
from octavo.core import exit_codes

BASELINE, INSIDE, OUTSIDE, NOT_JUDGED = "baseline", "inside", "outside", "not judged"

_OF_THE_JOB = (("model", "name"), ("model", "flavor"), ("training", "seq_len"))
"""Settings without which two losses are not of the same thing."""


@dataclass(frozen=True)
class LossVerdict:
    """word: one of the four above. reason: where the gap and the band alone do not give it."""

    word: str
    reason: str | None = None


def verdict_of(
    run: RunData, partner: RunData, base: RunData, gaps: Mapping[int, float], band: Mapping[int, float]
) -> LossVerdict:
    """The verdict on `run`. gaps: to `partner`, smoothed. band: of the noise of `base`.

    A run is outside wherever that can be told, from its numbers alone if need be. Inside is said of the whole
    run, so of nothing that ends before the baseline does.
    """
    if run is base:
        return LossVerdict(BASELINE)
    if failed(base):
        return LossVerdict(NOT_JUDGED, f"{base.name} itself {_failure(base)}")
    if failed(run):
        return LossVerdict(OUTSIDE, f"it {_failure(run)}")
    other = [f"{section}.{key}" for section, key in _OF_THE_JOB if _differs(run, base, section, key)]
    if other:
        return LossVerdict(NOT_JUDGED, f"it has another {other[0]} than {base.name}")
    if spacing(run) != spacing(base):
        every, usual = spacing(run), spacing(base)
        return LossVerdict(
            NOT_JUDGED,
            f"it tells its loss every {every:g} steps and {base.name} every {usual:g}: train both with one "
            "metrics.log_freq",
        )
    mine, theirs = run.tokens_beside(partner)
    if mine != theirs:
        return LossVerdict(
            NOT_JUDGED, f"it read {mine:,} tokens in steps in which {partner.name} read {theirs:,}"
        )
    bad = [step for step in not_finite(run) if math.isfinite(partner.losses.get(step, 0.0))]
    if bad:
        return LossVerdict(OUTSIDE, f"its loss was not finite in step {bad[0]}")
    widest = noise.widest(gaps, band)
    if widest is None:
        return LossVerdict(
            NOT_JUDGED, f"the noise of {base.name} is not known" if not band else "it is too short"
        )
    if not widest.inside:
        return LossVerdict(OUTSIDE)
    until, last = max(step for step in gaps if step in band), last_step(base)
    if until < last:
        return LossVerdict(NOT_JUDGED, f"inside, but known up to step {until} of {last} only")
    return LossVerdict(INSIDE)


def doubt_control(told: Sequence[dict[str, Any]]) -> None:
    """Take "inside" back where a negative control is not outside: then nothing could have been."""
    failing = [run["name"] for run in told if run["kind"] == "control" and run["verdict"] != OUTSIDE]
    for run in told:
        if failing and run["kind"] != "control" and run["verdict"] == INSIDE:
            run["verdict"] = NOT_JUDGED
            run["verdict_reason"] = f"inside, but so would be anything: {failing[0]} is not outside"


def failed(run: RunData) -> bool:
    """Whether `run` ended because its numbers were not finite."""
    return run.exit_code == exit_codes.BAD_NUMBERS or not math.isfinite(run.losses[last_step(run)])


def not_finite(run: RunData) -> list[int]:
    """The steps in which its loss was not finite."""
    return [step for step, loss in run.losses.items() if not math.isfinite(loss)]


def last_step(run: RunData) -> int:
    """The last step that `run` reports."""
    return int(run.reports[-1]["step"])


def spacing(run: RunData) -> float:
    """How many steps lie between two reports of `run`, mostly; 1 for a single one."""
    steps = [report["step"] for report in run.reports]
    return median(b - a for a, b in pairwise(steps)) if len(steps) > 1 else 1.0


def _failure(run: RunData) -> str:
    return f"ended at step {last_step(run)}, because its numbers were not finite"


def _differs(run: RunData, base: RunData, section: str, key: str) -> bool:
    mine, theirs = (one.config.get(section, {}).get(key) for one in (run, base))
    return mine is not None and theirs is not None and mine != theirs
