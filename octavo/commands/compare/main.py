"""`octavo compare`: is the loss the same, how much faster, how much memory? One report with the answer.

    octavo compare --config-file debug_model.toml --steps 200 --recipes bf16,tensorwise,rowwise --bf16-seeds 3
    octavo compare RUN_A RUN_B …

The first form trains, once in every recipe, and goes on where it was interrupted; flags of training
(--section.key value) hold for all runs. The second compares folders of runs that were. docs/compare.md tells
what the verdicts mean. Exit codes: those of training; 0 whatever the verdicts are.
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
from octavo.commands.compare.executor import Executor, exit_code, is_over, measure_saved
from octavo.commands.compare.report.figures import choose_baseline, figures_of
from octavo.commands.compare.report.run_data import RunData, load_run
from octavo.commands.compare.report.write_report import environment_of, model_of, write_report
from octavo.commands.compare.runs import make_plan, parse_recipes, read_plan, remember
from octavo.config import ConfigError
from octavo.core import exit_codes
from octavo.core.file_lock import open_lock, try_lock
from octavo.launch import launcher

_RECIPES = "bf16,tensorwise,rowwise"
_MOST_JOBS = 64
_MOST_SEEDS = 100
_LOCK = ".lock"


def _parser() -> Parser:
    parser = Parser(
        "octavo compare",
        "Train one configuration in several recipes, and with several seeds in high precision, and write a\n"
        "report: losses against the noise of the seeds, speed, memory. Or compare folders of finished runs:\n"
        "octavo compare RUN_A RUN_B …",
        "All other flags are those of training, for every run: --config_file, --training.compile, … (octavo\n"
        "train --help). NGPU and CONFIG_FILE are as for ./run_train.sh. The same command goes on with an\n"
        "interrupted comparison. In names of flags - and _ are the same.",
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
        help="seeds of the high-precision run, whose differences are the noise; 2 at least (default: 3)",
    )
    parser.add_argument(
        "--no_control",
        action="store_true",
        default=SUPPRESS,
        help="leave out the negative control, a recipe that has to come out as bad",
    )
    parser.add_argument(
        "--jobs",
        type=bounded_int(1, _MOST_JOBS),
        default=SUPPRESS,
        metavar="N",
        help="runs side by side (default: 2 on a CPU with cores enough, 1 on GPUs)",
    )
    parser.add_argument(
        "--keep_checkpoints",
        action="store_true",
        default=SUPPRESS,
        help="keep those of finished runs, which are deleted else",
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
    """`octavo compare`: the exit code. Raises `ConfigError` for a mistake in what was asked."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options, rest = parser.read_known(argv)
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
            if is_new and os.listdir(out) == [_LOCK]:  # nothing was begun
                shutil.rmtree(out)
            raise


def _compare_folders(words: Sequence[str], options: Namespace, out: Path, argv: Sequence[str]) -> int:
    flags = [word for word in words if word.startswith("--")]
    ours = ("steps", "recipes", "bf16_seeds", "no_control", "jobs", "keep_checkpoints")
    flags += [f"--{name}" for name in ours if hasattr(options, name)]
    if flags:
        raise ConfigError(f"{flags[0]}: is for runs that are to be trained, and {words[0]} is a run that was")
    if len(words) < 2:
        raise ConfigError(f"{words[0]}: one run has nothing to be compared with; name two or more")
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
    """`run` as what it is beside `base`: of several runs without float8, one is the baseline."""
    if run is base or run.recipe is not None:
        return run
    return replace(run, kind="recipe" if run.seed == base.seed else "seed")


def _names(folders: Sequence[str]) -> list[str]:
    """A short name for each: the folder's own, or as much of the path as tells it from the others."""
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
    before = read_plan(out)
    processes = launcher.processes_wanted(os.environ, gpus)
    jobs = getattr(options, "jobs", None) or (1 if gpus or cores < 2 * processes else 2)
    threads = before["threads"] if before is not None else _threads(gpus, cores, jobs * processes)
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
    remember(plan)
    code = Executor(plan, jobs=jobs, keep_checkpoints=hasattr(options, "keep_checkpoints"))()
    if code != exit_codes.DONE:
        why = "stopped" if code == exit_codes.REQUEUE else "a run did not end well (above)"
        print(f"octavo compare: {why}; the same command goes on", file=sys.stderr)
        return code
    if not measure_saved(plan):
        print("octavo compare: what is kept for backward could not be measured", file=sys.stderr)
    runs = _runs_of(out)
    base = next(run for run in runs if run.kind == "baseline")
    notes = [f"The runs ran {jobs} at a time, which each slowed the others."] if jobs > 1 else []
    return _report(out, runs, base, shlex.split(plan.command), options.target_loss, notes)


def _threads(gpus: int, cores: int, side_by_side: int) -> int | None:
    """Threads of a process on a CPU: the cores shared out, unless OMP_NUM_THREADS says how many."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if gpus:
        return None
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return max(1, cores // side_by_side)


def _runs_of(out: Path) -> list[RunData]:
    """All runs of the comparison in `out` that are over."""
    plan = read_plan(out)
    assert plan is not None
    runs = []
    for told in plan["runs"]:
        folder = out / "runs" / told["name"]
        if not is_over(folder):
            continue
        known = {key: told[key] for key in ("name", "kind", "recipe", "seed")}
        runs.append(
            load_run(folder, **known, exit_code=exit_code(folder), command=_by_hand(plan, told["flags"]))
        )
    return runs


def _by_hand(plan: Mapping[str, Any], flags: Sequence[str]) -> str:
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
    figures = figures_of(runs, target=target)
    if base.record.get("device") == "cpu" and any(run.recipe for run in runs):
        notes = [*notes, "On a CPU float8 is emulated: it costs time here, and these speeds are not a GPU's."]
    figures |= {
        "model": model_of(base),
        "environment": environment_of(base),
        "command": shlex.join(command),
        "speed_notes": list(notes),
    }
    page = write_report(out, figures)
    for warning in figures["warnings"]:
        print(f"octavo compare: note: {warning}", file=sys.stderr)
    for run in figures["runs"]:
        if run["verdict"] != "baseline":
            print(f"{run['name']}: {run['verdict']}{_how_far(run)}")
    print(f"The report: {page} (Markdown: {page.with_suffix('.md')})")
    return exit_codes.DONE


def _how_far(run: Mapping[str, Any]) -> str:
    if run["verdict_reason"] is not None:
        return f": {run['verdict_reason']}"
    widest = run["widest"]
    assert widest is not None  # it gave the verdict
    return f", at most {widest['share']:.3f} of the band ({widest['gap']:+.4f} nats at step {widest['step']})"
