"""`octavo compare`: compares recipes by loss, speed and memory, in one report.

    octavo compare --config-file debug_model.toml --steps 200 --recipes bf16,tensorwise,rowwise --bf16-seeds 3
    octavo compare RUN_A RUN_B …

The first form trains once in each recipe, and resumes after an interruption; training flags (--section.key
value) apply to all runs. The second form compares the folders of finished runs. docs/compare.md explains the
verdicts. Exit codes: those of training; 0 for any verdict.
"""

import os
import shlex
import shutil
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.commands.argparser import Parser, bounded_float, bounded_int
from octavo.commands.compare.executor import Executor, exit_code, is_finished, measure_activation_memory
from octavo.commands.compare.report.figures import choose_baseline, figures_of
from octavo.commands.compare.report.run_data import RunData, load_run
from octavo.commands.compare.report.write_report import write_report
from octavo.commands.compare.runs import make_plan, parse_recipes, read_plan, save_plan
from octavo.config import ConfigError
from octavo.core import exit_codes
from octavo.core.file_lock import open_lock, try_lock
from octavo.core.terminal import for_terminal
from octavo.launch import launcher

_RECIPES = "bf16,tensorwise,rowwise"
_MOST_JOBS = 64
_MOST_SEEDS = 100
_LOCK = ".lock"


def _parser() -> Parser:
    parser = Parser(
        "octavo compare",
        "Train one configuration in several recipes, and with several seeds in high precision, and write a\n"
        "report: losses relative to the noise between seeds, speed, memory. Or compare folders of finished\n"
        "runs: octavo compare RUN_A RUN_B …",
        "All other flags are training flags, for every run: --config_file, --training.compile, … (octavo\n"
        "train --help). NGPU and CONFIG_FILE work as for ./run_train.sh. Rerun the same command to continue\n"
        "an interrupted comparison. - and _ are equal in the names of flags.",
    )
    parser.add_argument(
        "--steps",
        type=bounded_int(1),
        default=SUPPRESS,
        metavar="N",
        help="of each run (default: training.steps)",
    )
    parser.add_argument(
        "--recipes", default=SUPPRESS, metavar="A,B", help=f"what to compare (default: {_RECIPES})"
    )
    parser.add_argument(
        "--bf16_seeds",
        type=bounded_int(2, _MOST_SEEDS),
        default=SUPPRESS,
        metavar="N",
        help="seeds of the high-precision run, whose differences are the noise; at least 2 (default: 3)",
    )
    parser.add_argument(
        "--no_control",
        action="store_true",
        default=SUPPRESS,
        help="omit the negative control, a recipe that must be judged as outside the noise",
    )
    parser.add_argument(
        "--jobs",
        type=bounded_int(1, _MOST_JOBS),
        default=SUPPRESS,
        metavar="N",
        help="concurrent runs (default: 2 on a CPU with enough cores, 1 on GPUs)",
    )
    parser.add_argument(
        "--keep_checkpoints",
        action="store_true",
        default=SUPPRESS,
        help="keep the checkpoints of finished runs, which are otherwise deleted",
    )
    parser.add_argument(
        "--target_loss",
        type=bounded_float(0, 1e6, above=True),
        metavar="X",
        help="loss to time (default: bf16's after 3/4 of its steps)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/compare"),
        metavar="FOLDER",
        help="(default: outputs/compare)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo compare`; returns the exit code. Raises `ConfigError` for a usage error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options, rest = _parser().read_known(argv)
    out = options.out.expanduser()
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open_lock(out / _LOCK)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot write there: {error.strerror}") from None
    with lock:
        if not try_lock(lock):
            raise ConfigError(f"--out {options.out}: another octavo compare is at work there")
        compare = _compare_folders if rest and not rest[0].startswith("--") else _train_and_compare
        try:
            return compare(rest, options, out, argv)
        except ConfigError:
            if is_new and os.listdir(out) == [_LOCK]:  # no run was started
                shutil.rmtree(out)
            raise


def _compare_folders(words: Sequence[str], options: Namespace, out: Path, argv: Sequence[str]) -> int:
    flags = [word for word in words if word.startswith("--")]
    training_only = ("steps", "recipes", "bf16_seeds", "no_control", "jobs", "keep_checkpoints")
    flags += [f"--{name}" for name in training_only if hasattr(options, name)]
    if flags:
        raise ConfigError(f"{flags[0]}: has no effect on {words[0]}, a run that is already trained")
    if len(words) < 2:
        raise ConfigError(f"{words[0]}: one run cannot be compared; name two or more")
    if read_plan(out) is not None:
        raise ConfigError(f"--out {out}: holds a comparison that trains; name another folder")
    folders = [Path(word).expanduser() for word in words]
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise ConfigError(f"--out {out}: is one of the runs; name another folder for the report")
    runs = [load_run(folder, name=name) for folder, name in zip(folders, _names(words), strict=True)]
    base = choose_baseline(runs)
    runs = [_with_kind(run, base) for run in runs]
    return _report(out, runs, base, ["octavo", "compare", *argv], options.target_loss)


def _with_kind(run: RunData, base: RunData) -> RunData:
    """Of several runs without float8, one is the baseline; the others are its seeds, or judged."""
    if run is base or run.recipe is not None:
        return run
    return replace(run, kind="recipe" if run.seed == base.seed else "seed")


def _names(folders: Sequence[str]) -> list[str]:
    """A short name for each folder: as many trailing parts of its path as make the names distinct."""
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise ConfigError(f"{folders[number]}: named twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _train_and_compare(words: Sequence[str], options: Namespace, out: Path, argv: Sequence[str]) -> int:
    gpus, cores = launcher.count_gpus(os.environ), launcher.usable_cores()
    existing = read_plan(out)
    processes = launcher.processes_wanted(os.environ, gpus)
    jobs = getattr(options, "jobs", None) or (1 if gpus or cores < 2 * processes else 2)
    threads = _threads(gpus, cores, jobs * processes) if existing is None else existing["threads"]
    plan = make_plan(
        out=out,
        recipes=parse_recipes(getattr(options, "recipes", _RECIPES)),
        seeds=getattr(options, "bf16_seeds", 3),
        steps=getattr(options, "steps", None),
        control=not hasattr(options, "no_control"),
        options=words,
        environ=os.environ,
        gpus=gpus,
        cores=cores,
        threads=threads,
        command=argv,
    )
    save_plan(plan)
    code = Executor(plan, jobs=jobs, keep_checkpoints=hasattr(options, "keep_checkpoints"))()
    if code != exit_codes.DONE:
        reason = "stopped" if code == exit_codes.REQUEUE else "a run failed (see above)"
        print(f"octavo compare: {reason}; rerun the same command to continue", file=sys.stderr)
        return code
    if not measure_activation_memory(plan):
        print("octavo compare: the activation memory could not be measured", file=sys.stderr)
    runs = _finished_runs(out)
    base = next(run for run in runs if run.kind == "baseline")
    notes = [f"{jobs} runs ran at a time, which slowed all of them."] if jobs > 1 else []
    return _report(out, runs, base, shlex.split(plan.command), options.target_loss, notes)


def _threads(gpus: int, cores: int, processes: int) -> int | None:
    """Threads per process on a CPU: OMP_NUM_THREADS, or an equal share of the cores."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if gpus:
        return None
    if requested.isdecimal() and int(requested) > 0:
        return int(requested)
    return max(1, cores // processes)


def _finished_runs(out: Path) -> list[RunData]:
    """Load all finished runs of the comparison in `out`."""
    plan = read_plan(out)
    assert plan is not None
    runs = []
    for run in plan["runs"]:
        folder = out / "runs" / run["name"]
        if is_finished(folder):
            fields = {key: run[key] for key in ("name", "kind", "recipe", "seed")}
            command = _run_command(plan, run["flags"])
            runs.append(load_run(folder, **fields, exit_code=exit_code(folder), command=command))
    return runs


def _run_command(plan: Mapping[str, Any], flags: Sequence[str]) -> str:
    threads = f"OMP_NUM_THREADS={plan['threads']} " if plan["threads"] else ""
    return f"{threads}NGPU={plan['processes']} ./run_train.sh {shlex.join(flags)}"


def _report(
    out: Path,
    runs: Sequence[RunData],
    base: RunData,
    command: Sequence[str],
    target: float | None,
    notes: Sequence[str] = (),
) -> int:
    if base.record.get("device") == "cpu" and any(run.recipe for run in runs):
        notes = [*notes, "On a CPU float8 is emulated, which takes time; these speeds are not a GPU's."]
    figures = figures_of(runs, target=target, command=shlex.join(command), speed_notes=notes)
    page = write_report(out, figures)
    for warning in figures["warnings"]:
        print(for_terminal(f"octavo compare: note: {warning}"), file=sys.stderr)
    for run in figures["runs"]:
        if run["verdict"] != "baseline":
            print(for_terminal(f"{run['name']}: {run['verdict']}{_explain_verdict(run)}"))
    print(f"The report: {page} (Markdown: {page.with_suffix('.md')})")
    return exit_codes.DONE


def _explain_verdict(run: Mapping[str, Any]) -> str:
    if run["verdict_reason"] is not None:
        return f": {run['verdict_reason']}"
    widest = run["widest"]
    assert widest is not None  # a verdict without a reason follows from it
    return f", at most {widest['share']:.3f} of the band ({widest['gap']:+.4f} nats at step {widest['step']})"
