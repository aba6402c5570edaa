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

from octavo import exits
from octavo.report import noise
from octavo.report.health import health_of
from octavo.report.load import RunData

_SAME_BY_NATURE = {
    ("job", "dump_folder"),
    ("job", "description"),
    ("job", "config_file"),
    ("job", "print_config"),
    ("training", "seed"),
    ("training", "data_seed"),
    ("model", "converters"),
}
_NOT_COMPARED = ("float8", "checkpoint", "metrics", "profiling", "comm", "memory_estimation")
_EARLIER = 0.75  # of the baseline's steps: the loss there is the target, which runs somewhat worse also reach


def figures_of(runs: Sequence[RunData], *, target: float | None = None) -> dict[str, Any]:
    """What a report on `runs` says. The first baseline among them (or, if there is none, the first run) is
    what the others are compared with. target: a loss to reach; None takes the baseline's after three quarters
    of its steps.
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
    return {
        "baseline": base.name,
        "window": window,
        "seeds": [run.seed for run in seeds],
        "band": _pairs(band),
        "target_loss": target,
        "control_outside": all(run["verdict"] == "outside" for run in control) if control else None,
        "warnings": _warnings(runs, base, seeds, told),
        "runs": told,
    }


def _seeds(runs: Sequence[RunData], base: RunData) -> list[RunData]:
    """The runs that show the baseline's noise, one a seed; the baseline's first."""
    found = {base.seed: base}
    for run in runs:
        if run.recipe == base.recipe and run.kind in ("baseline", "seed"):
            found.setdefault(run.seed, run)
    return list(found.values())


def _partner(run: RunData, runs: Sequence[RunData], base: RunData) -> RunData:
    """What `run` is compared with: a baseline that reads the same batches, and starts from the same weights,
    if there is one.
    """
    if run.kind == "seed":
        return base

    def likeness(other: RunData) -> tuple[bool, bool]:
        return other.data_seed == run.data_seed, other.seed == run.seed

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
    smoothed = noise.smooth(run.losses, window)
    gaps = {} if run is base else noise.gap(run.losses, partner.losses, window)
    mean = None
    if run is not base and run.data_seed == partner.data_seed:
        mean = noise.mean_difference(run.losses, partner.losses)
    falls = -noise.slope(noise.smooth(partner.losses, window))
    late = run.reports[1:] or run.reports
    seconds = median(report["seconds"] for report in late)
    reached = None if target is None else noise.first_below(smoothed, target)
    tokens = {report["step"]: report["tokens"] for report in run.reports}
    widest = noise.widest(gaps, band)
    bad = [step for step, loss in run.losses.items() if not math.isfinite(loss)]
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
        "same_batches": run.data_seed == partner.data_seed,
        "exit_code": run.exit_code,
        "steps": run.reports[-1]["step"],
        "losses": _pairs(run.losses),
        "smoothed": _pairs(smoothed),
        "gaps": _pairs(gaps),
        "verdict": _verdict(run, base, widest, bad),
        "widest": None if widest is None else asdict(widest),
        "largest_gap": _largest(gaps),
        "mean_gap": None if mean is None else asdict(mean),
        "steps_behind": mean.mean / falls if mean is not None and falls > 0 else None,
        "not_finite": bad,
        "final_loss": next(reversed(smoothed.values()), None),
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


def _verdict(run: RunData, base: RunData, widest: noise.Widest | None, bad: Sequence[int]) -> str:
    """ "baseline", "inside", "outside", or "not judged" where there is no band."""
    if run is base:
        return "baseline"
    if run.exit_code == exits.BAD_NUMBERS or (bad and bad[-1] == run.reports[-1]["step"]):
        return "outside"
    if widest is None:
        return "not judged"
    return "inside" if widest.inside else "outside"


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


def _warnings(
    runs: Sequence[RunData], base: RunData, seeds: Sequence[RunData], told: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What a reader has to know before believing the figures."""
    found = []
    if len(seeds) < 2:
        found.append(
            f"There is one seed of {base.name}, so its noise is not known and nothing is judged: run it with "
            "other seeds too (--bf16-seeds 3)."
        )
    elif len(seeds) == 2:
        found.append("Two seeds give a wide band: three or more judge better.")
    for run in runs:
        differing = _differences(base, run)
        if differing:
            found.append(f"{run.name} has another configuration than {base.name}: {'; '.join(differing)}.")
        if run.reports[-1]["step"] != base.reports[-1]["step"] and run.exit_code != exits.BAD_NUMBERS:
            found.append(
                f"{run.name} ends at step {run.reports[-1]['step']}, {base.name} at step "
                f"{base.reports[-1]['step']}: only the steps of both are compared."
            )
    for one in told:
        if one["not_finite"]:
            found.append(f"{one['name']}: the loss was not finite in step {one['not_finite'][0]}.")
        if one["compared_with"] is not None and not one["same_batches"]:
            found.append(
                f"{one['name']} read its batches in another order than {one['compared_with']} "
                "(training.seed, training.data_seed): the gap has the noise of the batches in it."
            )
        if one["kind"] == "recipe" and one["same_batches"] and not one["same_weights"]:
            found.append(
                f"{one['name']} started from other weights than {one['compared_with']} (training.seed)."
            )
        if one["kind"] == "seed" and one["verdict"] == "outside":
            found.append(
                f"{one['name']} itself comes out as outside: the seeds lie further apart than the band "
                "allows for. Take more seeds before believing a verdict."
            )
        if one["kind"] == "control" and one["verdict"] != "outside":
            found.append(
                f"The negative control {one['name']} does not come out as outside: this comparison cannot "
                "tell a bad recipe from a good one. Give it more steps."
            )
    devices = {(run.record.get("device"), run.record.get("processes")) for run in runs}
    if len(devices) > 1:
        found.append("The runs ran on different devices or numbers of processes: speeds do not compare.")
    return found


def _differences(base: RunData, run: RunData) -> list[str]:
    """In words, the settings that differ beyond recipe and seed."""
    differing = []
    for section, values in base.config.items():
        if section in _NOT_COMPARED:
            continue
        theirs = run.config.get(section, {})
        differing += [
            f"{section}.{key} is {theirs[key]}, not {value}"
            for key, value in values.items()
            if (section, key) not in _SAME_BY_NATURE and key in theirs and theirs[key] != value
        ]
    return differing


def _pairs(series: Mapping[int, float]) -> list[list[float | None]]:
    """[step, value] pairs; JSON has no NaN, so null."""
    return [[step, value if math.isfinite(value) else None] for step, value in series.items()]
