"""The sentences and tables that both pages of a report share."""

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.commands.compare.report.health_grid import Worst, worst_of
from octavo.core.format import count

Run = Mapping[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

_MIN_WINDOW = 5  # reports per smoothed loss, below which it still has much of the batches' noise
_VERDICTS = {
    "inside": "Inside the noise band of the baseline's seeds for the whole run",
    "outside": "Outside the noise band of the baseline's seeds",
    "not judged": "Not judged",
}


def report_title(figures: Mapping[str, Any]) -> str:
    recipes = [run["name"] for run in figures["runs"] if run["kind"] in ("baseline", "recipe")]
    return f"{', '.join(recipes)}: {_base(figures)['steps']:,} steps of {figures['model']}"


def _base(figures: Mapping[str, Any]) -> Run:
    found: Run = next(run for run in figures["runs"] if run["name"] == figures["baseline"])
    return found


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The result, in a few sentences."""
    base, sentences = _base(figures), []
    dtype = base["high_precision_dtype"]
    if base["recipe"] is None and dtype != "bfloat16":
        sentences.append(
            f"{base['name']} is high precision, which is {dtype} on this device; differences are those of "
            "float8 to it."
        )
    recipes = [run for run in figures["runs"] if run["kind"] == "recipe"]
    for verdict, sentence in _VERDICTS.items():
        names = [run["name"] for run in recipes if run["verdict"] == verdict]
        if names:
            sentences.append(f"{sentence}: {', '.join(names)}.")
    steady = [
        f"{run['name']} {mean['mean']:+.4f} ± {mean['half_width']:.4f} nats{_steps_behind(run)}"
        for run in recipes
        if (mean := run["mean_gap"]) is not None and abs(mean["mean"]) > mean["half_width"]
    ]
    if steady:
        sentences.append(
            f"Steady difference to {base['name']} over the second half of the run, within the band or not: "
            f"{'; '.join(steady)}."
        )
    if figures["control_outside"] is not None:
        control = next(run["name"] for run in figures["runs"] if run["kind"] == "control")
        sentences.append(
            f"The negative control {control} is outside the noise band, as expected."
            if figures["control_outside"]
            else f"The negative control {control} is NOT outside the noise band: the comparison is too "
            "insensitive to judge anything."
        )
    return sentences


def _steps_behind(run: Run) -> str:
    steps = run["steps_behind"]
    if steps is None:
        return ""
    return f" ({abs(steps):.1f} steps {'behind' if steps > 0 else 'ahead'})"


def close_up_heading(figures: Mapping[str, Any]) -> str:
    """The heading of the chart that shows the recipes only."""
    differences = any(run["differences"] for run in figures["runs"] if run["kind"] == "recipe")
    return f"The recipes, enlarged{'; faint: every step' if differences else ''}"


def verdict_table(figures: Mapping[str, Any]) -> Table:
    """One row per run except the baseline."""
    rows: list[tuple[str, ...]] = []
    for run in figures["runs"]:
        if run["kind"] == "baseline" and run["name"] == figures["baseline"]:
            continue
        widest, largest, mean = run["widest"], run["largest_gap"], run["mean_gap"]
        rows.append(
            (
                run["name"],
                _verdict(run),
                "n/a" if largest is None else f"{largest['gap']:+.4f} at step {largest['step']}",
                "n/a" if widest is None else f"{widest['share']:.3f} at step {widest['step']}",
                "n/a" if mean is None else f"{mean['mean']:+.5f} ± {mean['half_width']:.5f}",
                "n/a" if run["steps_behind"] is None else f"{run['steps_behind']:+.1f}",
                "n/a" if run["final_loss"] is None else f"{run['final_loss']:.4f}",
            )
        )
    head = (
        "run",
        "verdict",
        "largest gap, nats",
        "largest gap / band",
        "mean gap, second half",
        "steps behind",
        "final loss, smoothed",
    )
    return head, rows


def _verdict(run: Run) -> str:
    if run["kind"] == "control" and run["verdict"] == "inside":
        return "NOT outside"
    return str(run["verdict"]) + (f": {run['verdict_reason']}" if run["verdict_reason"] else "")


def worst_layer_table(figures: Mapping[str, Any]) -> Table | None:
    """One row per float8 run and operand, with its worst layers; None if health was not measured."""
    rows: list[tuple[str, ...]] = []
    for run in figures["runs"]:
        for operand, grid in (run["health"] or {}).items():
            flushed, saturated = (worst_of(grid, measure, max) for measure in ("flushed", "saturated"))
            noisy = worst_of(grid, "sqnr", min)
            rows.append(
                (
                    run["name"],
                    operand,
                    _worst(flushed, ".2%"),
                    "none" if saturated and not saturated.value else _worst(saturated, ".2%"),
                    _worst(noisy, ".1f", " dB"),
                )
            )
    head = ("run", "operand", "most flushed to zero", "most saturated", "lowest SQNR")
    return (head, rows) if rows else None


def _worst(worst: Worst | None, number: str, unit: str = "") -> str:
    return "n/a" if worst is None else f"{worst.value:{number}}{unit}: {worst.layer}, step {worst.step}"


def speed_table(figures: Mapping[str, Any]) -> Table:
    """One row for the baseline and for each recipe."""
    rows: list[tuple[str, ...]] = []
    for run in figures["runs"]:
        if run["kind"] not in ("baseline", "recipe"):
            continue
        target, saved = run["target"], run["saved_bytes"]
        ratio, speedup = run["tps_ratio"], run["speedup_to_target"]
        rows.append(
            (
                run["name"],
                f"{run['median_tps']:,.0f}" + (f" ({ratio:.2f}x)" if ratio else ""),
                f"{run['median_step_seconds']:.3f}",
                f"{run['peak_memory_gib']:.2f}",
                "not reached" if target is None else f"{target['tokens']:,}",
                "not reached" if target is None else f"{target['seconds']:,.1f}",
                "n/a" if speedup is None else f"{speedup:.2f}x",
                "n/a" if not saved else f"{saved / 2**20:,.1f}",
            )
        )
    loss = figures["target_loss"]
    target_name = "the target loss" if loss is None else f"loss {loss:.4f}"
    head = (
        "run",
        "tokens/s/device, median",
        "s/step, median",
        "peak memory, GiB",
        f"tokens to {target_name}",
        f"seconds to {target_name}",
        "speedup to it",
        "activation memory, MiB",
    )
    return head, rows


def validation_table(figures: Mapping[str, Any]) -> Table | None:
    """The last validation of each run; None if there was none."""
    rows: list[tuple[str, ...]] = [
        (run["name"], f"{run['validation']['step']}", f"{run['validation']['loss']:.4f}")
        for run in figures["runs"]
        if run["validation"]
    ]
    return (("run", "step", "validation loss"), rows) if rows else None


def reading_notes(figures: Mapping[str, Any]) -> list[str]:
    """How to read the figures."""
    window, seeds, base = figures["window"], figures["seeds"], figures["baseline"]
    recipes = [run for run in figures["runs"] if run["kind"] == "recipe"]
    alike = all(run["same_batches"] and run["same_weights"] for run in recipes)
    notes = [
        f"Gaps are differences of the training loss to {base}"
        f"{', which read the same batches and started from the same weights' if alike else ''}; positive is "
        f"worse. Each is a mean over {window} reports.",
    ]
    if figures["band"]:
        low, high = (f(width for _, width in figures["band"]) for f in (min, max))
        notes.append(
            f"The band is the noise of the baseline, from {len(seeds)} runs with different initial weights "
            f"(seeds {', '.join(map(str, seeds))}). At a given step, the difference of two such runs "
            f"is within the band in 19 cases of 20, as estimated from {len(seeds)} runs: {low:.4f} to "
            f"{high:.4f} nats here. A gap within it is not larger than the effect of changing the seed."
        )
    notes += [
        "The mean gap is over the single steps of the second half of the run, with a 95% interval from batch "
        "means. If the interval excludes zero, the difference is steady; it may still be within the band. "
        "Steps behind: how many steps earlier the baseline had that loss, by its slope over the second half; "
        "a gap too large for that is looked up in its curve.",
        f"The final loss is the mean of the last {window} reports; a failed run has none.",
        "Speeds are medians over all reports but the first; seconds to a loss are steps times the median. "
        "Peak memory is the allocator's on a GPU; on a CPU it is the process's, at its reports.",
        "Activation memory is what eager layers save for backward, without activation checkpointing.",
    ]
    if window < _MIN_WINDOW:
        notes.append(
            f"In a run this short a smoothed loss is a mean over only {count(window, 'report')}, so the "
            "tokens and seconds to a loss are rough."
        )
    return [*notes, *figures["speed_notes"]]


def environment_rows(figures: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return [(name, str(value)) for name, value in figures["environment"].items() if value not in (None, "")]
