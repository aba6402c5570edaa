"""What a reader has to know before believing a report: runs that do not match, noise that is not known."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from octavo.commands.compare.report.run_data import RunData
from octavo.commands.compare.report.verdict import OUTSIDE, failed, last_step

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


def cautions_of(
    runs: Sequence[RunData], base: RunData, seeds: Sequence[RunData], told: Sequence[Mapping[str, Any]]
) -> list[str]:
    """One sentence each. seeds: the runs that show the noise of `base`. told: the figures of `runs`."""
    named = {run.name: run for run in runs}
    return [
        *_of_the_baseline(base, seeds),
        *(
            f"{run.name} is not taken for the noise of {base.name}: {why}."
            for run in runs
            if is_a_seed(run, base) and (why := why_no_seed(run, base)) is not None
        ),
        *(sentence for run in runs for sentence in _of_its_settings(run, base)),
        *(
            sentence
            for one in told
            if one["compared_with"] is not None
            for sentence in _of_its_batches(named[one["name"]], named[one["compared_with"]])
        ),
        *(sentence for one in told for sentence in _of_its_verdict(one, base)),
        *_of_the_machines(runs),
    ]


def is_a_seed(run: RunData, base: RunData) -> bool:
    """Whether `run` is there to show the noise of `base`: its recipe from other initial weights."""
    return run is not base and run.recipe == base.recipe and run.kind in ("baseline", "seed")


def why_no_seed(run: RunData, base: RunData) -> str | None:
    """Why the noise of `base` cannot be told from `run`; None where it can. Whatever else differs would pass
    for noise, and hide what a recipe does.
    """
    if run.data_seed != base.data_seed:
        return "it read other batches (give all runs one training.data_seed)"
    differing = _differences(base, run)
    if differing:
        return f"it has another configuration ({'; '.join(differing)})"
    if not run.reads_as(base):
        return f"it read other batches: {_larger_steps(run, base)}"
    return None


def _larger_steps(run: RunData, base: RunData) -> str:
    mine, theirs = run.tokens_beside(base)
    return (
        f"{mine:,} tokens where {base.name} had read {theirs:,}, in as many steps (give all runs one "
        "training.global_batch_size, which else follows from the number of processes)"
    )


def _of_the_baseline(base: RunData, seeds: Sequence[RunData]) -> Iterator[str]:
    if base.recipe is not None:
        yield f"All runs are in float8: {base.name}, in {base.recipe}, stands in for a baseline."
    if failed(base):
        yield (
            f"{base.name}, the baseline, ended at step {last_step(base)} because its numbers were not "
            "finite: nothing is judged. The usual remedy is a lower optimizer.lr or more "
            "lr_scheduler.warmup_steps."
        )
    for seed in seeds[1:]:
        if failed(seed):
            yield (
                f"{seed.name} ended at step {last_step(seed)} because its numbers were not finite: the noise "
                "is known up to there only."
            )
    if len(seeds) < 2:
        yield (
            f"There is one seed of {base.name}, so its noise is not known and nothing is judged: train it "
            "from other weights too (octavo compare --bf16-seeds 3; or training.seed = 43 with the same "
            "training.data_seed, and name that folder)."
        )
    elif len(seeds) == 2:
        yield "Two seeds give a wide band: three or more judge better."


def _of_its_settings(run: RunData, base: RunData) -> Iterator[str]:
    differing = _differences(base, run)
    if differing and not is_a_seed(run, base):
        yield f"{run.name} has another configuration than {base.name}: {'; '.join(differing)}."
    stopped = run.kind == "control" and last_step(run) < last_step(base)  # it was seen enough of
    if last_step(run) != last_step(base) and not stopped and not failed(run):
        yield (
            f"{run.name} ends at step {last_step(run)}, {base.name} at step {last_step(base)}: only the "
            "steps of both are compared."
        )


def _of_its_batches(run: RunData, partner: RunData) -> Iterator[str]:
    if run.data_seed != partner.data_seed:
        yield (
            f"{run.name} read its batches in another order than {partner.name} (training.seed, "
            "training.data_seed): the gap has the noise of the batches in it."
        )
    elif not run.reads_as(partner):
        yield f"{run.name} read other batches than {partner.name}: {_larger_steps(run, partner)}."


def _of_its_verdict(one: Mapping[str, Any], base: RunData) -> Iterator[str]:
    name, partner = one["name"], one["compared_with"]
    if one["not_finite"]:
        yield f"{name}: the loss was not finite in step {one['not_finite'][0]}."
    if partner not in (None, base.name):
        yield f"{name} is compared with {partner}, which is more like it, and not with {base.name}."
    if one["kind"] == "recipe" and one["same_batches"] and not one["same_weights"]:
        yield f"{name} started from other weights than {partner} (training.seed)."
    if one["kind"] == "seed" and one["verdict"] == OUTSIDE and one["verdict_reason"] is None:
        yield (
            f"{name} itself comes out as outside: the seeds lie further apart than the band allows for. Take "
            "more seeds before believing a verdict."
        )
    if one["kind"] == "control" and one["verdict"] != OUTSIDE:
        yield (
            f"The negative control {name} does not come out as outside: this comparison cannot tell a bad "
            "recipe from a good one. Give it more steps, or more seeds."
        )


def _of_the_machines(runs: Sequence[RunData]) -> Iterator[str]:
    if len({(run.record.get("device"), run.record.get("processes")) for run in runs}) > 1:
        yield "The runs ran on different devices or numbers of processes: speeds do not compare."


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
