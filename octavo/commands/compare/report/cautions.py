"""Cautions for the reader of a report: runs that do not match, unknown noise, an insensitive comparison."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from octavo.commands.compare.report.run_data import RunData
from octavo.commands.compare.report.verdict import OUTSIDE, failed, last_step

_EXPECTED_TO_DIFFER = {
    ("job", "dump_folder"),
    ("job", "description"),
    ("job", "config_file"),
    ("job", "print_config"),
    ("training", "seed"),
    ("training", "data_seed"),
    ("model", "converters"),
}
_NOT_COMPARED = ("float8", "checkpoint", "metrics", "profiling", "comm", "memory_estimation")


def find_cautions(
    runs: Sequence[RunData], base: RunData, seeds: Sequence[RunData], figures: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return one sentence per caution. seeds: the runs that give the noise of `base`. figures: those of
    `runs`.
    """
    by_name = {run.name: run for run in runs}
    return [
        *_about_the_baseline(base, seeds),
        *(
            f"{run.name} is excluded from the noise band of {base.name}: {reason}."
            for run in runs
            if is_seed_run(run, base) and (reason := reason_not_a_seed_run(run, base)) is not None
        ),
        *(sentence for run in runs for sentence in _about_settings(run, base)),
        *(
            sentence
            for one in figures
            if one["compared_with"] is not None
            for sentence in _about_batches(by_name[one["name"]], by_name[one["compared_with"]])
        ),
        *(sentence for one in figures for sentence in _about_the_verdict(one, base)),
        *_about_devices(runs),
    ]


def is_seed_run(run: RunData, base: RunData) -> bool:
    """Whether `run` is meant to show the noise of `base`: the same recipe with other initial weights."""
    return run is not base and run.recipe == base.recipe and run.kind in ("baseline", "seed")


def reason_not_a_seed_run(run: RunData, base: RunData) -> str | None:
    """Why `run` cannot be used for the noise of `base`; None if it can. Any other difference than the initial
    weights would count as noise, and hide the effect of a recipe.
    """
    if run.data_seed != base.data_seed:
        return "it read other batches (give all runs one training.data_seed)"
    differing = _differences(base, run)
    if differing:
        return f"it has another configuration ({'; '.join(differing)})"
    if not run.read_same_batches_as(base):
        return f"it read other batches: {_batch_sizes(run, base)}"
    return None


def _batch_sizes(run: RunData, base: RunData) -> str:
    run_tokens, base_tokens = run.common_tokens(base)
    return (
        f"{run_tokens:,} tokens where {base.name} had read {base_tokens:,}, in as many steps (give all runs "
        "one training.global_batch_size, which otherwise depends on the number of processes)"
    )


def _about_the_baseline(base: RunData, seeds: Sequence[RunData]) -> Iterator[str]:
    if base.recipe is not None:
        yield f"All runs are in float8; {base.name}, in {base.recipe}, is used as the baseline."
    if failed(base):
        yield (
            f"{base.name}, the baseline, ended at step {last_step(base)} because its numbers were not "
            "finite, so nothing is judged. The usual remedy is a lower optimizer.lr or more "
            "lr_scheduler.warmup_steps."
        )
    for seed in seeds[1:]:
        if failed(seed):
            yield (
                f"{seed.name} ended at step {last_step(seed)} because its numbers were not finite; the noise "
                "is only known up to that step."
            )
    if len(seeds) < 2:
        yield (
            f"There is one seed of {base.name}, so its noise is not known and nothing is judged. Train it "
            "from other initial weights too (octavo compare --bf16-seeds 3; or training.seed = 43 with the "
            "same training.data_seed, and add that folder)."
        )
    elif len(seeds) == 2:
        yield "Two seeds give a wide noise band; use three or more for a narrower one."


def _about_settings(run: RunData, base: RunData) -> Iterator[str]:
    differing = _differences(base, run)
    if differing and not is_seed_run(run, base):
        yield f"{run.name} has another configuration than {base.name}: {'; '.join(differing)}."
    stopped = run.kind == "control" and last_step(run) < last_step(base)  # on purpose
    if last_step(run) != last_step(base) and not stopped and not failed(run):
        yield (
            f"{run.name} ends at step {last_step(run)}, {base.name} at step {last_step(base)}; only the "
            "steps of both are compared."
        )


def _about_batches(run: RunData, partner: RunData) -> Iterator[str]:
    if run.data_seed != partner.data_seed:
        yield (
            f"{run.name} read its batches in another order than {partner.name} (training.seed, "
            "training.data_seed), so the gap includes the noise of the batches."
        )
    elif not run.read_same_batches_as(partner):
        yield f"{run.name} read other batches than {partner.name}: {_batch_sizes(run, partner)}."


def _about_the_verdict(figures: Mapping[str, Any], base: RunData) -> Iterator[str]:
    name, partner, kind = figures["name"], figures["compared_with"], figures["kind"]
    if figures["not_finite"]:
        yield f"{name}: the loss was not finite in step {figures['not_finite'][0]}."
    if partner not in (None, base.name):
        yield f"{name} is compared with {partner}, which is more similar to it than {base.name}."
    if kind == "recipe" and figures["same_batches"] and not figures["same_weights"]:
        yield f"{name} started from other initial weights than {partner} (training.seed)."
    if kind == "seed" and figures["verdict"] == OUTSIDE and figures["verdict_reason"] is None:
        yield (
            f"{name}, a seed of the baseline, is outside the noise band: the band is too narrow for these "
            "seeds. Use more seeds before relying on a verdict."
        )
    if kind == "control" and figures["verdict"] != OUTSIDE:
        yield (
            f"The negative control {name} is not outside the noise band, so this comparison is too "
            "insensitive to judge anything. Use more steps or more seeds."
        )


def _about_devices(runs: Sequence[RunData]) -> Iterator[str]:
    if len({(run.record.get("device"), run.record.get("processes")) for run in runs}) > 1:
        yield "The runs used different devices or numbers of processes, so their speeds are not comparable."


def _differences(base: RunData, run: RunData) -> list[str]:
    """Describe the settings that differ, other than recipe and seed."""
    differing = []
    for section, values in base.config.items():
        if section in _NOT_COMPARED:
            continue
        other = run.config.get(section, {})
        differing += [
            f"{section}.{key} is {other[key]}, not {value}"
            for key, value in values.items()
            if (section, key) not in _EXPECTED_TO_DIFFER and key in other and other[key] != value
        ]
    return differing
