"""From the data of some runs to the figures of a report: plain values, ready for JSON.

Speed and memory are as the runs reported them, medians and maxima over their reports but the first, which has
the start in it. Seconds to a loss are steps times the median step, so that neither an interruption nor a save
counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from octavo.commands.compare.report import noise
from octavo.commands.compare.report.cautions import cautions_of, is_a_seed, why_no_seed
from octavo.commands.compare.report.health_grid import health_of
from octavo.commands.compare.report.run_data import RunData
from octavo.commands.compare.report.verdict import doubt_control, failed, not_finite, spacing, verdict_of

_EARLIER = 0.75  # of the baseline's steps: the loss there is the target, which runs somewhat worse also reach


def figures_of(runs: Sequence[RunData], *, target: float | None = None) -> dict[str, Any]:
    """What a report on `runs` says. The first of kind "baseline" (or, if there is none, the first run) is
    what the others are compared with. target: a loss to reach; None takes the baseline's after three
    quarters of its steps.
    """
    base = next((run for run in runs if run.kind == "baseline"), runs[0])
    window = noise.window_of(len(base.reports))
    seeds = _seeds(runs, base)
    band = noise.noise_band([run.losses for run in seeds], window)
    base_smooth = noise.smooth(base.losses, window)
    if target is None and base_smooth:
        until = base.reports[int((len(base.reports) - 1) * _EARLIER)]["step"]
        reached = [loss for step, loss in base_smooth.items() if step <= until]
        target = reached[-1] if reached else None

    told = [_run(run, _partner(run, runs, base), base, band, window, target) for run in runs]
    _add_ratios(told, base.name)
    control = [run for run in told if run["kind"] == "control"]
    doubt_control(told)
    return {
        "baseline": base.name,
        "window": window,
        "seeds": [run.seed for run in seeds],
        "band": _pairs(band),
        "target_loss": target,
        "control_outside": all(run["verdict"] == "outside" for run in control) if control else None,
        "warnings": cautions_of(runs, base, seeds, told),
        "runs": told,
    }


def _seeds(runs: Sequence[RunData], base: RunData) -> list[RunData]:
    """The runs that show the baseline's noise, one a seed; the baseline's first. They differ from it in their
    initial weights alone.
    """
    found = {base.seed: base}
    for run in runs:
        if is_a_seed(run, base) and not why_no_seed(run, base):
            found.setdefault(run.seed, run)
    return list(found.values())


def _partner(run: RunData, runs: Sequence[RunData], base: RunData) -> RunData:
    """What `run` is compared with: a baseline that reads the same batches, and starts from the same weights,
    if there is one.
    """
    if run.kind == "seed":
        return base

    def likeness(other: RunData) -> tuple[bool, bool]:
        return run.reads_as(other), other.seed == run.seed

    others = [one for one in runs if one.recipe == base.recipe and one.kind in ("baseline", "seed")]
    return max([base, *others], key=likeness)


def _run(
    run: RunData,
    partner: RunData,
    base: RunData,
    band: Mapping[int, float],
    window: int,
    target: float | None,
) -> dict[str, Any]:
    alike = spacing(run) == spacing(base)  # else the mean of so many losses covers other steps
    smoothed = noise.smooth(run.losses, window) if alike else {}
    gaps = {} if run is base else noise.gap(run.losses, partner.losses, window)
    mean = None
    if run is not base and run.reads_as(partner):
        mean = noise.mean_difference(run.losses, partner.losses)
    late = run.reports[1:] or run.reports
    seconds = median(report["seconds"] for report in late)
    reached = None if target is None else noise.first_below(smoothed, target)
    tokens = {report["step"]: report["tokens"] for report in run.reports}
    widest = noise.widest(gaps, band)
    verdict = verdict_of(run, partner, base, gaps, band)
    return {
        "name": run.name,
        "kind": run.kind,
        "recipe": run.recipe,
        "seed": run.seed,
        "folder": str(run.folder),
        "command": run.command,
        "precision": run.record.get("precision"),
        "high_precision_dtype": run.record.get("high_precision_dtype"),
        "compared_with": None if run is base else partner.name,
        "same_weights": run.seed == partner.seed,
        "same_batches": run.reads_as(partner),
        "exit_code": run.exit_code,
        "steps": run.reports[-1]["step"],
        "losses": _pairs(run.losses),
        "smoothed": _pairs(smoothed),
        "gaps": _pairs(gaps),
        "differences": _pairs({} if run is base else noise.gap(run.losses, partner.losses, 1)),
        "verdict": verdict.word,
        "verdict_reason": verdict.reason,
        "widest": None if widest is None else asdict(widest),
        "largest_gap": _largest(gaps),
        "mean_gap": None if mean is None else asdict(mean),
        "steps_behind": noise.steps_behind(mean, smoothed, noise.smooth(partner.losses, window)),
        "not_finite": not_finite(run),
        "final_loss": None if failed(run) or not smoothed else smoothed[max(smoothed)],
        "median_tps": median(report["tps"] for report in late),
        "median_step_seconds": seconds,
        "peak_memory_gib": max(report["memory_gib"] for report in run.reports),
        "tokens": run.reports[-1]["tokens"],
        "target": None
        if reached is None
        else {"step": reached, "tokens": tokens[reached], "seconds": reached * seconds},
        "saved_bytes": run.saved_bytes,
        "validation": _validation(run),
        "health": health_of(run.health),
    }


def choose_baseline(runs: Sequence[RunData]) -> RunData:
    """Of the runs without float8 the one that most others share weights and batches with, the first of
    equals; the first run where all are in float8.
    """
    free = [run for run in runs if run.recipe is None]

    def alike(base: RunData) -> int:
        return sum(run.seed == base.seed and run.reads_as(base) for run in runs)

    return max(free, key=alike) if free else runs[0]


def _largest(gaps: Mapping[int, float]) -> dict[str, float] | None:
    if not gaps:
        return None
    step = max(gaps, key=lambda step: abs(gaps[step]))
    return {"step": step, "gap": gaps[step]}


def _validation(run: RunData) -> dict[str, Any] | None:
    if not run.validations:
        return None
    last = run.validations[-1]
    return {"step": last["step"], "loss": last["validation_loss"]}


def _add_ratios(told: Sequence[dict[str, Any]], baseline: str) -> None:
    """Each run's speed over the baseline's, by tokens per second and by seconds to the target loss."""
    base = next(run for run in told if run["name"] == baseline)
    for run in told:
        run["tps_ratio"] = run["median_tps"] / base["median_tps"] if base["median_tps"] else None
        both = run["target"] and base["target"]
        run["speedup_to_target"] = base["target"]["seconds"] / run["target"]["seconds"] if both else None


def _pairs(series: Mapping[int, float]) -> list[list[float | None]]:
    """[step, value] pairs; JSON has no NaN, so null."""
    return [[step, value if math.isfinite(value) else None] for step, value in series.items()]
