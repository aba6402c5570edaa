"""Judges a run: inside or outside the noise of the baseline, or not judged, with the reason."""

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

_SAME_TASK = (("model", "name"), ("model", "flavor"), ("model", "args"), ("training", "seq_len"))
"""Settings that must be equal for two losses to be comparable."""


@dataclass(frozen=True)
class LossVerdict:
    """word: one of the four above. reason: None if the verdict follows from the gap and the band."""

    word: str
    reason: str | None = None


def judge(
    run: RunData, partner: RunData, base: RunData, gaps: Mapping[int, float], band: Mapping[int, float]
) -> LossVerdict:
    """Return the verdict on `run`. gaps: smoothed, to `partner`. band: the noise of `base`.

    A run is outside as soon as that is known, also from non-finite numbers alone. It is inside only if all of
    the baseline's steps are known.
    """
    if run is base:
        return LossVerdict(BASELINE)
    if failed(base):
        return LossVerdict(NOT_JUDGED, f"{base.name} itself {_failure(base)}")
    if failed(run):
        return LossVerdict(OUTSIDE, f"it {_failure(run)}")
    differing = [f"{section}.{key}" for section, key in _SAME_TASK if _differs(run, base, section, key)]
    if differing:
        return LossVerdict(NOT_JUDGED, f"it has another {differing[0]} than {base.name}")
    if spacing(run) != spacing(base):
        return LossVerdict(
            NOT_JUDGED,
            f"it reports its loss every {spacing(run):g} steps and {base.name} every {spacing(base):g}; "
            "train both with one metrics.log_freq",
        )
    run_tokens, partner_tokens = run.common_tokens(partner)
    if run_tokens != partner_tokens:
        return LossVerdict(
            NOT_JUDGED,
            f"it read {run_tokens:,} tokens in the steps in which {partner.name} read {partner_tokens:,}",
        )
    bad = [step for step in nonfinite_steps(run) if math.isfinite(partner.losses.get(step, 0.0))]
    if bad:
        return LossVerdict(OUTSIDE, f"its loss was not finite in step {bad[0]}")
    widest = noise.widest(gaps, band)
    if widest is None:
        reason = "it is too short" if band else f"the noise of {base.name} is not known"
        return LossVerdict(NOT_JUDGED, reason)
    if not widest.inside:
        return LossVerdict(OUTSIDE)
    until, last = max(step for step in gaps if step in band), last_step(base)
    if until < last:
        return LossVerdict(NOT_JUDGED, f"inside, but only known up to step {until} of {last}")
    return LossVerdict(INSIDE)


def withdraw_without_control(figures: Sequence[dict[str, Any]]) -> None:
    """Change "inside" to "not judged" if a negative control is not outside: any run would be inside."""
    inside = [run["name"] for run in figures if run["kind"] == "control" and run["verdict"] != OUTSIDE]
    for run in figures:
        if inside and run["kind"] != "control" and run["verdict"] == INSIDE:
            run["verdict"] = NOT_JUDGED
            run["verdict_reason"] = f"inside, but the control {inside[0]} is not outside"


def failed(run: RunData) -> bool:
    """Whether `run` ended because its numbers were not finite."""
    return run.exit_code == exit_codes.BAD_NUMBERS or not math.isfinite(run.losses[last_step(run)])


def nonfinite_steps(run: RunData) -> list[int]:
    return [step for step, loss in run.losses.items() if not math.isfinite(loss)]


def last_step(run: RunData) -> int:
    return int(run.reports[-1]["step"])


def spacing(run: RunData) -> float:
    """Median number of steps between two reports of `run`; 1 for a single report."""
    steps = [report["step"] for report in run.reports]
    return median(b - a for a, b in pairwise(steps)) if len(steps) > 1 else 1.0


def _failure(run: RunData) -> str:
    return f"ended at step {last_step(run)}, because its numbers were not finite"


def _differs(run: RunData, base: RunData, section: str, key: str) -> bool:
    value, base_value = (one.config.get(section, {}).get(key) for one in (run, base))
    return value is not None and base_value is not None and value != base_value
