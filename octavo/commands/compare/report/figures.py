"""Computes the figures of a report from the data of its runs: plain values, ready for JSON.

Speeds are medians over all reports but the first, which includes the start of the run. Seconds to a loss are
steps times the median step time, so that interruptions and checkpoints do not count.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from octavo.commands.compare.report import noise
from octavo.commands.compare.report.cautions import find_cautions, is_seed_run, reason_not_a_seed_run
from octavo.commands.compare.report.health_grid import health_grids
from octavo.commands.compare.report.run_data import RunData
from octavo.commands.compare.report.verdict import (
    failed,
    judge,
    nonfinite_steps,
    spacing,
    withdraw_without_control,
)

_TARGET_SHARE = 0.75
"""Share of the baseline's steps after which its loss is the target; slightly worse runs reach it too."""
_ENVIRONMENT = {
    "device": "device",
    "processor": "cpu",
    "processes": "processes",
    "threads of a process": "threads",
    "high precision": "high_precision_dtype",
    "octavo": "octavo",
    "commit": "commit",
    "torch": "torch",
    "CUDA": "cuda",
    "Python": "python",
    "system": "platform",
}
"""Name in the report -> key in the baseline's run.json."""


def figures_of(
    runs: Sequence[RunData],
    *,
    target: float | None = None,
    command: str = "",
    speed_notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Compute the content of a report on `runs`.

    The others are compared with the first run of kind "baseline", or with the first run if there is none.
    target: the loss whose time is measured; None takes the baseline's loss after three quarters of its steps.
    """
    base = next((run for run in runs if run.kind == "baseline"), runs[0])
    window = noise.smoothing_window(len(base.reports))
    seeds = _seed_runs(runs, base)
    band = noise.noise_band([run.losses for run in seeds], window)
    base_smooth = noise.smooth(base.losses, window)
    if target is None and base_smooth:
        until = base.reports[int((len(base.reports) - 1) * _TARGET_SHARE)]["step"]
        reached = [loss for step, loss in base_smooth.items() if step <= until]
        target = reached[-1] if reached else None

    figures = [_run_figures(run, _partner(run, runs, base), base, band, window, target) for run in runs]
    _add_ratios(figures, base.name)
    control = [run for run in figures if run["kind"] == "control"]
    withdraw_without_control(figures)
    model = base.config.get("model", {})
    return {
        "baseline": base.name,
        "window": window,
        "seeds": [run.seed for run in seeds],
        "band": _pairs(band),
        "target_loss": target,
        "control_outside": all(run["verdict"] == "outside" for run in control) if control else None,
        "warnings": find_cautions(runs, base, seeds, figures),
        "runs": figures,
        "model": f"{model.get('name')} {model.get('flavor')}",
        "environment": {name: base.record.get(key) for name, key in _ENVIRONMENT.items()},
        "command": command,
        "speed_notes": list(speed_notes),
    }


def _seed_runs(runs: Sequence[RunData], base: RunData) -> list[RunData]:
    """The runs that give the baseline's noise, one per seed, the baseline first."""
    by_seed = {base.seed: base}
    for run in runs:
        if is_seed_run(run, base) and not reason_not_a_seed_run(run, base):
            by_seed.setdefault(run.seed, run)
    return list(by_seed.values())


def _partner(run: RunData, runs: Sequence[RunData], base: RunData) -> RunData:
    """The baseline run that `run` is compared with; if possible, of the same batches and weights."""
    if run.kind == "seed":
        return base

    def similarity(other: RunData) -> tuple[bool, bool]:
        return run.read_same_batches_as(other), other.seed == run.seed

    others = [one for one in runs if one.recipe == base.recipe and one.kind in ("baseline", "seed")]
    return max([base, *others], key=similarity)


def _run_figures(
    run: RunData,
    partner: RunData,
    base: RunData,
    band: Mapping[int, float],
    window: int,
    target: float | None,
) -> dict[str, Any]:
    same_spacing = spacing(run) == spacing(base)  # otherwise a window covers other steps
    smoothed = noise.smooth(run.losses, window) if same_spacing else {}
    gaps = {} if run is base else noise.gap(run.losses, partner.losses, window)
    mean = None
    if run is not base and run.read_same_batches_as(partner):
        mean = noise.mean_difference(run.losses, partner.losses)
    late = run.reports[1:] or run.reports
    seconds = median(report["seconds"] for report in late)
    reached = None if target is None else noise.first_below(smoothed, target)
    tokens = {report["step"]: report["tokens"] for report in run.reports}
    widest = noise.widest(gaps, band)
    verdict = judge(run, partner, base, gaps, band)
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
        "same_batches": run.read_same_batches_as(partner),
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
        "not_finite": nonfinite_steps(run),
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
        "health": health_grids(run.health),
    }


def choose_baseline(runs: Sequence[RunData]) -> RunData:
    """Return the run without float8 that shares weights and batches with most others, the first of equals;
    the first run if all are in float8.
    """
    candidates = [run for run in runs if run.recipe is None]

    def matches(base: RunData) -> int:
        return sum(run.seed == base.seed and run.read_same_batches_as(base) for run in runs)

    return max(candidates, key=matches) if candidates else runs[0]


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


def _add_ratios(figures: Sequence[dict[str, Any]], baseline: str) -> None:
    """Add each run's speed relative to the baseline's: tokens per second, and seconds to the target loss."""
    base = next(run for run in figures if run["name"] == baseline)
    for run in figures:
        run["tps_ratio"] = run["median_tps"] / base["median_tps"] if base["median_tps"] else None
        both = run["target"] and base["target"]
        run["speedup_to_target"] = base["target"]["seconds"] / run["target"]["seconds"] if both else None


def _pairs(series: Mapping[int, float]) -> list[list[float | None]]:
    """[step, value] pairs for JSON, with null for NaN."""
    return [[step, value if math.isfinite(value) else None] for step, value in series.items()]
