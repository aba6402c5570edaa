r"""octavo tune: which recipe each linear layer of a job should take, as fast goes, on this GPU.

    octavo tune --config-file llama3_8b.toml --out tuned.toml
    octavo train --config-file llama3_8b.toml --model.converters=float8 \
        --float8.layer_recipes_file tuned.toml

For each size of product in the model it times high precision and every recipe, casts included, and writes
down the fastest of each layer; the modules of this folder describe how. Flags that change the sizes (batch,
length, parallelism, and `--processes` for their number) belong to both commands. What was measured is kept,
by GPU and software.

Speed is all it looks at. A recipe that is fast may train worse: compare losses before a long run, and leave
out what you would not train in (`--recipes`). Each layer is timed by itself: no communication, no neighbour
whose kernels a compiler could fuse with its casts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from octavo import config
from octavo.commands.tune import cost_cache, recipe_costs
from octavo.commands.tune.choice import RecipeChoice, choose, fragment
from octavo.commands.tune.linear_sizes import Group, Size, groups_of
from octavo.commands.tune.recipe_costs import CANDIDATES, HIGH_PRECISION, Costs
from octavo.config import ConfigError, JobConfig, names
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.config.ranges import out_of_range
from octavo.core.fs import write_file
from octavo.float8 import RECIPES
from octavo.metrics.device import pick_device
from octavo.roofline import GPUS, Gpu, find_gpu

DEFAULT_GPU = "h100"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo tune",
        description="Find the fastest float8 recipe of each linear layer. Takes octavo train's flags, too.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("tuned.toml"), help="the file to write (tuned.toml)")
    parser.add_argument("--processes", type=int, default=1, help="that the job will have (1)")
    parser.add_argument(
        "--recipes",
        default=",".join(CANDIDATES),
        help=f"comma-separated candidates; all: {','.join(CANDIDATES)}",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"measure nothing, calculate for this GPU by the roofline model: {', '.join(GPUS)}; "
        f"{DEFAULT_GPU} where there is no GPU",
    )
    parser.add_argument("--refresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep measurements")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `octavo tune argv`; returns the exit code."""
    options, rest = _parser().parse_known_args(argv)
    job, layout = _job(rest, options.processes)
    candidates = _candidates(options.recipes)
    if options.refresh and options.no_cache:
        raise ConfigError("--refresh keeps what it measures, --no-cache keeps nothing: take one of the two")
    if options.out.parent != Path() and not options.out.parent.is_dir():
        raise ConfigError(f"--out={options.out}: no such folder")
    if options.out.is_dir():
        raise ConfigError(f"--out={options.out}: is a folder; name a file in it")
    groups, kept = groups_of(job, layout)
    sizes = list(dict.fromkeys(layer.size for group in groups for layer in group))

    device = pick_device()
    paper = options.gpu is not None or device.type != "cuda"
    if paper:
        for flag, given in (("--refresh", options.refresh), ("--no-cache", options.no_cache)):
            if given:
                raise ConfigError(f"{flag} would have no effect: nothing is measured{_why(options.gpu)}")
        gpu = _gpu(options.gpu or DEFAULT_GPU)
        able, unable = recipe_costs.runnable_on_paper(candidates, gpu)
        source = f"ESTIMATED by the roofline model for {gpu.name}: nothing was measured{_why(options.gpu)}"
        found = {size: recipe_costs.on_paper(size, _some(able, unable), gpu) for size in sizes}
    else:
        able, unable = recipe_costs.runnable(candidates, device)
        source = f"measured on {cost_cache.machine(device)}"
        path = None if options.no_cache else cost_cache.default_path()
        found = _measure(sizes, _some(able, unable), device, path, refresh=options.refresh)

    print(source)
    for name, why in unable.items():
        print(f"left out: {name}: {why}")
    shared = _microbatches(job, layout)
    choices = [choice for group in groups for choice in choose(group, found, shared)]
    comments = [
        "Which recipe each linear layer takes, by octavo tune. Use it with --float8.layer_recipes_file.",
        source,
        f"{datetime.now(UTC):%Y-%m-%d}; {_told(job, layout)}",
        f"candidates: {', '.join(able)}; kept from float8 by float8.filter_fqns: {', '.join(kept) or 'none'}",
        "Times: forward and backward of one microbatch, casts included.",
    ]
    text = fragment(choices, comments)
    try:
        write_file(options.out, text)
    except OSError as error:
        raise ConfigError(f"--out={options.out}: {error.strerror or error}") from None
    _print(choices, groups)
    if all(choice.recipe == HIGH_PRECISION for choice in choices):
        print(f"{options.out} is written. No layer gains from float8 here: train without it, and the file")
    else:
        print(
            f"{options.out} is written: --model.converters=float8 --float8.layer_recipes_file={options.out}"
        )
    return 0


def _job(argv: Sequence[str], processes: int) -> tuple[JobConfig, ParallelDims]:
    """The job as it will be trained; what only a start needs (data, folders) is not looked at."""
    if processes < 1:
        raise ConfigError(f"--processes={processes} must be at least 1")
    job = config.load(argv, prog="octavo tune")
    if job.job.config_file is None:
        raise ConfigError("name the job to tune: --config-file llama3_8b.toml, say")
    problems = out_of_range(job)
    for key in ("layer_recipes", "layer_recipes_file", "recipe_name"):
        if job.given.get(f"float8.{key}") == "cli":
            problems.append(f"--float8.{key} has no effect on octavo tune, which chooses the recipes itself")
    if problems:
        raise ConfigError("\n".join(problems))
    return job, parallel_dims_of(job.parallelism, processes)


def _candidates(text: str) -> list[str]:
    given = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in given if name not in CANDIDATES]
    if given == [HIGH_PRECISION]:
        raise ConfigError(f"--recipes={text}: nothing to choose from; name a float8 recipe")
    if unknown or not given:
        what = "names none"
        if unknown:
            what = f"{unknown[0]!r} is no recipe"
            if unknown[0] in names.PREVIOUS_STEP_RECIPES:
                what = f"{unknown[0]} is not timed, since its scales come from the steps of a training"
        raise ConfigError(f"--recipes={text}: {what}; there are {', '.join(CANDIDATES)}")
    return given


def _some(able: list[str], unable: Mapping[str, str]) -> list[str]:
    if not able:
        told = "; ".join(f"{name}: {why}" for name, why in unable.items())
        raise ConfigError(f"--recipes: none of them runs here: {told}")
    return able


def _gpu(name: str) -> Gpu:
    try:
        return find_gpu(name)
    except ValueError as error:
        raise ConfigError(f"--gpu: {error}") from None


def _why(asked: str | None) -> str:
    return " (--gpu)" if asked is not None else ", as there is no GPU here"


def _microbatches(job: JobConfig, layout: ParallelDims) -> dict[str, float]:
    """Recipe -> the microbatches of a step that share one cast of a weight."""
    local = job.training.local_batch_size
    steps = max(1, job.training.global_batch_size // (local * layout.data))
    if layout.pipeline > 1:
        steps *= local // job.parallelism.pipeline_parallel_microbatch_size
    found = {}
    for name, recipe in RECIPES.items():
        # Weights that FSDP gathers in high precision are cast whenever they come.
        gathered = layout.sharded > 1 and not (job.float8.enable_fsdp_float8_all_gather and recipe.gatherable)
        found[name] = float(steps) if job.float8.cast_weights_once and not gathered else 1.0
    return found


def _measure(
    sizes: Sequence[Size], candidates: list[str], device: torch.device, path: Path | None, *, refresh: bool
) -> dict[Size, Costs]:
    kept = cost_cache.Cache(path, cost_cache.machine(device))
    found: dict[Size, Costs] = {}
    for size in sizes:
        known = None if refresh else kept.look_up(size, candidates)
        print(f"{size}: {'measured before' if known else 'measuring'}", flush=True)
        found[size] = known or recipe_costs.measured(size, candidates, device, emulate=False)
        failed = None if known else kept.keep(size, found[size])
        if failed:
            print(f"not kept: {failed}", file=sys.stderr)
    return found


def _told(job: JobConfig, layout: ParallelDims) -> str:
    degrees = ", ".join(f"{axis} {n}" for axis, n in layout.degrees.items() if n > 1) or "one process"
    return (
        f"{job.model.name} {job.model.flavor}, local_batch_size {job.training.local_batch_size}, "
        f"seq_len {job.training.seq_len}, {degrees}"
    )


def _print(choices: Sequence[RecipeChoice], groups: Sequence[Group]) -> None:
    width = max(len(choice.layer.pattern) for choice in choices)
    print(f"{'layer':<{width}}  count  {'recipe':<19}  us     us in high precision")
    for c in choices:
        high = "n/a" if c.high_precision is None else f"{1e6 * c.high_precision:.0f}"
        print(
            f"{c.layer.pattern:<{width}}  {c.layer.count:>5}  {c.recipe:<19}  {1e6 * c.seconds:<5.0f}  {high}"
        )
    total = sum(c.seconds * c.layer.count for c in choices)
    if all(c.high_precision is not None for c in choices):
        high_total = sum((c.high_precision or 0.0) * c.layer.count for c in choices)
        print(
            f"all linear layers of {len(groups)} groups: {1e3 * total:.1f} ms, in high precision "
            f"{1e3 * high_total:.1f} ms: {high_total / total:.2f}x"
        )
