r"""`octavo tune`: finds the fastest recipe of each linear layer of a job on this GPU.

    octavo tune --config-file llama3_8b.toml --out tuned.toml
    octavo train --config-file llama3_8b.toml --model.converters=float8 \
        --float8.layer_recipes_file tuned.toml

It times high precision and every recipe for each size of product in the model, including casts, and writes
the fastest recipe of each layer. Flags that change the sizes (batch, length, parallelism, and `--processes`)
must be given to both commands. Measurements are cached by GPU and software.

Only speed is considered. A fast recipe may train worse: compare losses before a long run, and exclude recipes
with `--recipes`. Each layer is timed separately, without communication and without neighbours whose kernels a
compiler could fuse with its casts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from octavo import config
from octavo.commands.argparser import Parser, bounded_int
from octavo.commands.tune import cost_cache, recipe_costs
from octavo.commands.tune.choice import RecipeChoice, choose, layer_recipes_toml
from octavo.commands.tune.linear_sizes import Group, Size, groups_of
from octavo.commands.tune.recipe_costs import CANDIDATES, HIGH_PRECISION, Costs
from octavo.config import ConfigError, JobConfig, names
from octavo.config.option_checks import out_of_range
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.core.errors import Problem
from octavo.core.fs import write_file
from octavo.float8 import RECIPES
from octavo.metrics.device import pick_device
from octavo.roofline import GPUS, Gpu, find_gpu

DEFAULT_GPU = "h100"


def _parser() -> Parser:
    parser = Parser(
        "octavo tune",
        "Find the fastest float8 recipe of each linear layer. Accepts octavo train's flags too.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tuned.toml"), help="the file to write (default: tuned.toml)"
    )
    parser.add_argument(
        "--processes", type=bounded_int(1), default=1, help="processes of the job (default: 1)"
    )
    parser.add_argument(
        "--recipes",
        default=",".join(CANDIDATES),
        help=f"comma-separated candidates (default: {','.join(CANDIDATES)})",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"predict costs for this GPU with the roofline model, without measuring: {', '.join(GPUS)} "
        f"(default on a machine without a GPU: {DEFAULT_GPU})",
    )
    parser.add_argument("--refresh", action="store_true", help="repeat cached measurements")
    parser.add_argument("--no_cache", action="store_true", help="neither read nor write cached measurements")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `octavo tune argv`; returns the exit code."""
    options, job_flags = _parser().read_known(argv)
    job, layout = _load_job(job_flags, options.processes)
    candidates = _candidates(options.recipes)
    if options.refresh and options.no_cache:
        raise ConfigError("--refresh keeps what it measures, --no-cache keeps nothing; use one of the two")
    if options.out.parent != Path() and not options.out.parent.is_dir():
        raise ConfigError(f"--out={options.out}: no such folder")
    if options.out.is_dir():
        raise ConfigError(f"--out={options.out}: is a folder; name a file in it")
    groups, filtered = groups_of(job, layout)
    sizes = list(dict.fromkeys(layer.size for group in groups for layer in group))

    device = pick_device()
    if options.gpu is not None or device.type != "cuda":
        reason = " (--gpu)" if options.gpu is not None else ", as there is no GPU here"
        for flag, given in (("--refresh", options.refresh), ("--no-cache", options.no_cache)):
            if given:
                raise ConfigError(f"{flag} would have no effect: nothing is measured{reason}")
        gpu = _find_gpu(options.gpu or DEFAULT_GPU)
        supported, unsupported = recipe_costs.supported_by_model(candidates, gpu)
        source = f"ESTIMATED by the roofline model for {gpu.name}: nothing was measured{reason}"
        _require_some(supported, unsupported)
        costs = {size: recipe_costs.predict_costs(size, supported, gpu) for size in sizes}
    else:
        supported, unsupported = recipe_costs.supported_recipes(candidates, device)
        source = f"measured on {cost_cache.describe_machine(device)}"
        _require_some(supported, unsupported)
        path = None if options.no_cache else cost_cache.default_cache_path()
        costs = _measure(sizes, supported, device, path, refresh=options.refresh)

    print(source)
    for name, reason in unsupported.items():
        print(f"left out: {name}: {reason}")
    shared = _microbatches_per_cast(job, layout)
    choices = [choice for group in groups for choice in choose(group, costs, shared)]
    comments = [
        "The recipe of each linear layer, chosen by octavo tune. Use it with --float8.layer_recipes_file.",
        source,
        f"{datetime.now(UTC):%Y-%m-%d}; {_describe_job(job, layout)}",
        f"candidates: {', '.join(supported)}; excluded by filter_fqns: {', '.join(filtered) or 'none'}",
        "Times: forward and backward of one microbatch, including casts.",
    ]
    try:
        write_file(options.out, layer_recipes_toml(choices, comments))
    except OSError as error:
        raise ConfigError(f"--out={options.out}: {error.strerror or error}") from None
    _print_choices(choices, groups)
    if all(choice.recipe == HIGH_PRECISION for choice in choices):
        print(f"{options.out} is written. No layer is faster in float8 here: train without float8")
    else:
        print(
            f"{options.out} is written: --model.converters=float8 --float8.layer_recipes_file={options.out}"
        )
    return 0


def _load_job(argv: Sequence[str], processes: int) -> tuple[JobConfig, ParallelDims]:
    """Load and validate the job; requirements of a start, such as data and folders, are not checked."""
    job = config.load(argv, prog="octavo tune")
    if job.job.config_file is None:
        raise ConfigError("name the job to tune, for example --config-file llama3_8b.toml")
    problems = list(out_of_range(job))
    for key in ("layer_recipes", "layer_recipes_file", "recipe_name"):
        if job.given.get(f"float8.{key}") == "cli":
            why = "has no effect on octavo tune, which chooses the recipes itself"
            problems.append(Problem(f"--float8.{key} {why}", key=f"float8.{key}"))
    if problems:
        raise ConfigError(problems)
    return job, parallel_dims_of(job.parallelism, processes)


def _candidates(text: str) -> list[str]:
    candidates = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in candidates if name not in CANDIDATES]
    if candidates == [HIGH_PRECISION]:
        raise ConfigError(f"--recipes={text}: nothing to choose from; name a float8 recipe")
    if unknown or not candidates:
        problem = "names none"
        if unknown:
            problem = f"{unknown[0]!r} is not a recipe"
            if unknown[0] in names.PREVIOUS_STEP_RECIPES:
                problem = f"{unknown[0]} is not timed, since its scales come from the steps of a training run"
        raise ConfigError(f"--recipes={text}: {problem}; the candidates are {', '.join(CANDIDATES)}")
    return candidates


def _require_some(supported: list[str], unsupported: Mapping[str, str]) -> None:
    if not supported:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unsupported.items())
        raise ConfigError(f"--recipes: none of them is supported here: {reasons}")


def _find_gpu(name: str) -> Gpu:
    try:
        return find_gpu(name)
    except ValueError as error:
        raise ConfigError(f"--gpu: {error}") from None


def _microbatches_per_cast(job: JobConfig, layout: ParallelDims) -> dict[str, float]:
    """Recipe -> the number of microbatches per step that share one cast of a weight."""
    local = job.training.local_batch_size
    microbatches = max(1, job.training.global_batch_size // (local * layout.data))
    if layout.pipeline > 1:
        microbatches *= local // job.parallelism.pipeline_parallel_microbatch_size
    shared = {}
    for name, recipe in RECIPES.items():
        # Weights that FSDP gathers in high precision are cast after each gather.
        gathered = layout.sharded > 1 and not (job.float8.enable_fsdp_float8_all_gather and recipe.gatherable)
        shared[name] = float(microbatches) if job.float8.cast_weights_once and not gathered else 1.0
    return shared


def _measure(
    sizes: Sequence[Size], candidates: list[str], device: torch.device, path: Path | None, *, refresh: bool
) -> dict[Size, Costs]:
    cache = cost_cache.CostCache(path, cost_cache.describe_machine(device))
    costs: dict[Size, Costs] = {}
    for size in sizes:
        cached = None if refresh else cache.look_up(size, candidates)
        print(f"{size}: {'cached' if cached else 'measuring'}", flush=True)
        costs[size] = cached or recipe_costs.measure_costs(size, candidates, device, emulate=False)
        error = None if cached else cache.store(size, costs[size])
        if error:
            print(f"not cached: {error}", file=sys.stderr)
    return costs


def _describe_job(job: JobConfig, layout: ParallelDims) -> str:
    degrees = ", ".join(f"{axis} {n}" for axis, n in layout.degrees.items() if n > 1) or "one process"
    return (
        f"{job.model.name} {job.model.flavor}, local_batch_size {job.training.local_batch_size}, "
        f"seq_len {job.training.seq_len}, {degrees}"
    )


def _print_choices(choices: Sequence[RecipeChoice], groups: Sequence[Group]) -> None:
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
