"""What both pages of a report say in the same words: the tables, and the sentences about them."""

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.commands.compare.report.health_grid import worst_of

Run = Mapping[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

_ROUGH = 5  # reports in a smoothed loss below which it still has much of the batches' noise


def title_of(figures: Mapping[str, Any]) -> str:
    recipes = [run["name"] for run in figures["runs"] if run["kind"] in ("baseline", "recipe")]
    return f"{', '.join(recipes)}: {_base(figures)['steps']:,} steps of {figures['model']}"


def _base(figures: Mapping[str, Any]) -> Run:
    found: Run = next(run for run in figures["runs"] if run["name"] == figures["baseline"])
    return found


def summary_of(figures: Mapping[str, Any]) -> list[str]:
    """The answer, in a few sentences."""
    base, found = _base(figures), []
    dtype = base["high_precision_dtype"]
    if base["recipe"] is None and dtype != "bfloat16":
        found.append(
            f"{base['name']} stands for the high precision of this device, which is {dtype} here: the "
            "differences are those of float8 against it."
        )
    recipes = [run for run in figures["runs"] if run["kind"] == "recipe"]
    for verdict in ("inside", "outside", "not judged"):
        names = [run["name"] for run in recipes if run["verdict"] == verdict]
        if names:
            found.append(f"{_verdict_words(verdict)}: {', '.join(names)}.")
    steady = [
        f"{run['name']} {mean['mean']:+.4f} ± {mean['half_width']:.4f} nats{_behind(run)}"
        for run in recipes
        if (mean := run["mean_gap"]) is not None and abs(mean["mean"]) > mean["half_width"]
    ]
    if steady:
        found.append(
            f"A steady difference to {base['name']} over the second half, within the band or not: "
            f"{'; '.join(steady)}."
        )
    if figures["control_outside"] is not None:
        control = next(run["name"] for run in figures["runs"] if run["kind"] == "control")
        found.append(
            f"The negative control {control} comes out as outside, as it must."
            if figures["control_outside"]
            else f"The negative control {control} is NOT outside: this comparison proves nothing."
        )
    return found


def _behind(run: Run) -> str:
    steps = run["steps_behind"]
    if steps is None:
        return ""
    return f" ({abs(steps):.1f} steps {'behind' if steps > 0 else 'ahead'})"


def _verdict_words(verdict: str) -> str:
    return {
        "inside": "Inside the noise band of the baseline's seeds over the whole run",
        "outside": "Outside the noise band of the baseline's seeds",
        "not judged": "Not judged",
    }[verdict]


def close_by(figures: Mapping[str, Any]) -> str:
    """The heading of the panel that shows the recipes alone."""
    single = any(run["differences"] for run in figures["runs"] if run["kind"] == "recipe")
    return f"The recipes close by{'; faint: step by step' if single else ''}"


def verdicts_of(figures: Mapping[str, Any]) -> Table:
    """A row for each run but the baseline."""
    rows: list[tuple[str, ...]] = []
    for run in figures["runs"]:
        if run["kind"] == "baseline" and run["name"] == figures["baseline"]:
            continue
        widest, largest, mean = run["widest"], run["largest_gap"], run["mean_gap"]
        rows.append(
            (
                run["name"],
                _told_verdict(run),
                "n/a" if largest is None else f"{largest['gap']:+.4f} at step {largest['step']}",
                "n/a" if widest is None else f"{widest['share']:.3f} at step {widest['step']}",
                "n/a" if mean is None else f"{mean['mean']:+.5f} ± {mean['half_width']:.5f}",
                "n/a" if run["steps_behind"] is None else f"{run['steps_behind']:+.1f}",
                "n/a" if run["final_loss"] is None else f"{run['final_loss']:.4f}",
            )
        )
    head: tuple[str, ...] = (
        "run",
        "verdict",
        "largest gap, nats",
        "largest gap / band",
        "mean gap, second half",
        "steps behind",
        "final loss, smoothed",
    )
    return head, rows


def _told_verdict(run: Run) -> str:
    if run["kind"] == "control" and run["verdict"] == "inside":
        return "NOT outside"
    return str(run["verdict"]) + (f": {run['verdict_reason']}" if run["verdict_reason"] else "")


def worst_layers_of(figures: Mapping[str, Any]) -> Table | None:
    """Which layers suffer: for each float8 run and operand the worst layer by two measures; None without
    health.
    """
    rows: list[tuple[str, ...]] = []
    for run in figures["runs"]:
        for operand, grid in (run["health"] or {}).items():
            flushed, noisy = worst_of(grid, "flushed", max), worst_of(grid, "sqnr", min)
            saturated = worst_of(grid, "saturated", max)
            rows.append(
                (
                    run["name"],
                    operand,
                    "n/a"
                    if flushed is None
                    else f"{flushed.value:.2%}: {flushed.layer}, step {flushed.step}",
                    "n/a"
                    if saturated is None
                    else "none"
                    if not saturated.value
                    else f"{saturated.value:.2%}: {saturated.layer}, step {saturated.step}",
                    "n/a" if noisy is None else f"{noisy.value:.1f} dB: {noisy.layer}, step {noisy.step}",
                )
            )
    return (
        (("run", "operand", "most flushed to zero", "most saturated", "lowest SQNR"), rows) if rows else None
    )


def speeds_of(figures: Mapping[str, Any]) -> Table:
    """A row for the baseline and each recipe."""
    rows: list[tuple[str, ...]] = []
    for run in figures["runs"]:
        if run["kind"] not in ("baseline", "recipe"):
            continue
        target = run["target"]
        ratio, speedup = run["tps_ratio"], run["speedup_to_target"]
        saved = run["saved_bytes"]
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
    at = "the target loss" if loss is None else f"loss {loss:.4f}"
    head: tuple[str, ...] = (
        "run",
        "tokens/s/device, median",
        "s/step, median",
        "peak memory, GiB",
        f"tokens to {at}",
        f"seconds to {at}",
        "speedup to it",
        "MiB kept for backward",
    )
    return head, rows


def validation_of(figures: Mapping[str, Any]) -> Table | None:
    """The last validation of each run, if there was any."""
    rows: list[tuple[str, ...]] = [
        (run["name"], f"{run['validation']['step']}", f"{run['validation']['loss']:.4f}")
        for run in figures["runs"]
        if run["validation"]
    ]
    return (("run", "step", "validation loss"), rows) if rows else None


def notes_of(figures: Mapping[str, Any]) -> list[str]:
    """How to read the figures."""
    window, seeds = figures["window"], figures["seeds"]
    base = figures["baseline"]
    recipes = [run for run in figures["runs"] if run["kind"] == "recipe"]
    alike = all(run["same_batches"] and run["same_weights"] for run in recipes)
    found = [
        f"Gaps are differences of the training loss to {base}"
        f"{', which read the same batches and started from the same weights' if alike else ''}; positive is "
        f"worse. Each is a mean over {window} reports.",
    ]
    if figures["band"]:
        low, high = (f(width for _, width in figures["band"]) for f in (min, max))
        found.append(
            f"The band is the noise of the baseline: {len(seeds)} runs of it with other initial weights "
            f"(seeds {', '.join(map(str, seeds))}). At a step, the difference of two such runs is within it "
            f"in 19 cases of 20, as far as {len(seeds)} runs can tell: {low:.4f} to {high:.4f} nats here. A "
            "gap within it is no larger than the luck of a seed."
        )
    found += [
        "The mean gap is that of single steps over the second half of the run, with a 95% interval from "
        "batch means: beside zero, it is a steady difference, which may well lie within the band. Steps "
        "behind: how many steps earlier the baseline had that loss, by its slope over the second half; a gap "
        "too large for that is looked up in its curve.",
        f"The final loss is the mean of the last {window} reports; a run that failed has none.",
        "Speeds are medians over all reports but the first; seconds to a loss are steps times the median. "
        "Peak memory is the allocator's on a GPU; on a CPU it is the process's, at its reports.",
    ]
    if window < _ROUGH:
        found.append(
            f"A smoothed loss is a mean over {window} report{'s' if window > 1 else ''} only in a run this "
            "short, so the tokens and seconds to a loss are rough."
        )
    return [*found, *figures.get("speed_notes", [])]


def environment_of(figures: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return [(name, str(value)) for name, value in figures["environment"].items() if value not in (None, "")]
