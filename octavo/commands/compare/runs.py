"""Which runs a comparison needs, and the flags of each.

One configuration is trained once in every recipe, and in high precision with several seeds. A seed decides
the initial weights; all runs read the same batches in the same order (training.data_seed). So a recipe
differs from the baseline in its casts alone, and the baselines differ among themselves in what nobody
chooses, while the noise of the batches, which is far larger, cancels in every difference. One more run, the
negative control, is in a recipe that is known to train badly.

The plan is kept in the comparison's folder. The same command goes on with it, more recipes and seeds can be
added to it, and anything else that changes what is computed is an error.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from octavo import __version__, config
from octavo.config import ConfigError, JobConfig, flags, names
from octavo.config.ranges import get, named, shown
from octavo.core.errors import did_you_mean
from octavo.core.fs import write_file
from octavo.launch import launcher

BASELINE = "bf16"
"""What a run without float8 is called; what it computes in depends on the device, and its record tells it."""

CONTROL = names.CONTROLS[0]
CONTROL_STEPS = 100
"""The control ends after half of the steps, but not before so many: it only has to be seen outside."""

PLAN_FILE = "comparison.json"
CHECKPOINTS = "checkpoint"

Kind = Literal["baseline", "seed", "recipe", "control"]

_OURS = {
    "training.steps": "say --steps",
    "job.dump_folder": "say --out",
    "model.converters": "say --recipes",
    "float8.recipe_name": "say --recipes",
    "checkpoint.enable": "a comparison always saves, to go on after an interruption",
    "checkpoint.folder": "it is the comparison's own",
    "checkpoint.load_step": "a comparison starts at step 1",
    "checkpoint.load_only": "a comparison always saves, to go on after an interruption",
    "checkpoint.create_seed_checkpoint": "a comparison trains",
    "metrics.log_freq": "a comparison reads every step",
}
"""Keys that a comparison sets itself, and what to do instead."""

_NOT_THE_MATHS = ("job", "profiling", "metrics", "checkpoint", "comm", "memory_estimation")
"""Sections that a comparison may be gone on with otherwise: they change no loss."""


_MUST_BE_OFF = ("checkpoint.load_only", "checkpoint.create_seed_checkpoint")

_GATHER = "enable_fsdp_float8_all_gather"
_GATHERING = (f"--float8.{_GATHER}", "--float8.precompute_float8_dynamic_scale_for_fsdp")
"""What the control does without: weights without scales have none to gather."""


@dataclass(frozen=True)
class Run:
    """One run. name: of its folder. recipe: None is high precision."""

    name: str
    kind: Kind
    recipe: str | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """A comparison: `runs` of one configuration, in `out`. options: flags that all share. processes: of each
    run. threads: of each process, None for the launcher's choice.
    """

    out: Path
    runs: tuple[Run, ...]
    steps: int
    data_seed: int
    options: tuple[str, ...]
    config: Mapping[str, Mapping[str, Any]]
    processes: int
    threads: int | None
    command: str

    def folder(self, run: Run) -> Path:
        """Where `run` writes."""
        return self.out / "runs" / run.name

    def steps_of(self, run: Run) -> int:
        """After how many steps `run` is over. Its schedule is that of all `steps`, as the others' is."""
        if run.kind != "control":
            return self.steps
        return min(self.steps, max(self.steps // 2, CONTROL_STEPS))

    def flags(self, run: Run) -> tuple[str, ...]:
        """The training flags of `run`: `./run_train.sh` with them does the same by hand."""
        float8 = run.recipe is not None
        mine = [
            f"--job.dump_folder={self.folder(run)}",
            f"--training.steps={self.steps}",
            f"--training.seed={run.seed}",
            f"--training.data_seed={self.data_seed}",
            f"--model.converters={'float8' if float8 else ''}",
            "--metrics.log_freq=1",
            "--checkpoint.enable",
            f"--checkpoint.folder={CHECKPOINTS}",
            "--checkpoint.load_step=-1",
        ]
        if float8:
            mine.append(f"--float8.recipe_name={run.recipe}")
        theirs = [flag for flag in self.options if float8 or not flag.startswith("--float8.")]
        if run.kind == "control" and self.processes > 1 and self.config["float8"][_GATHER]:
            theirs = [flag for flag in theirs if not flag.startswith(_GATHERING)]
            mine.append(f"--float8.no_{_GATHER}")
        given = config.load(theirs).given
        if given.get("checkpoint.interval") != "cli":  # a file's is for long runs, or for looking at saves
            mine.append(f"--checkpoint.interval={self.now_and_then}")
        if "checkpoint.keep_latest_k" not in given:
            mine.append("--checkpoint.keep_latest_k=2")
        if float8 and self.measures_health:
            if "float8.health_every" not in given:
                mine.append(f"--float8.health_every={self.now_and_then}")
            if "float8.health_tokens" not in given and config.load([*theirs, *mine]).float8.health_every:
                mine.append("--float8.health_tokens=0")
        return (*theirs, *mine)

    @property
    def now_and_then(self) -> int:
        """Steps between saves, and between measurements of float8 health, where the caller says none: at most
        ten of each.
        """
        return max(10, self.steps // 10)

    @property
    def measures_health(self) -> bool:
        """Whether there is a step to measure, and whole operands to measure in one process."""
        layout = self.config["parallelism"]
        split = any(layout[f"{axis}_parallel_degree"] > 1 for axis in ("tensor", "pipeline"))
        return not split and self.now_and_then <= self.steps

    def to_json(self) -> dict[str, Any]:
        """What the comparison's folder keeps."""
        return {
            "octavo": __version__,
            "command": self.command,
            "steps": self.steps,
            "processes": self.processes,
            "threads": self.threads,
            "config": self.config,
            "runs": [{**asdict(run), "flags": list(self.flags(run))} for run in self.runs],
        }


def parse_recipes(text: str) -> tuple[str, ...]:
    """The recipes that a comma-separated list names, without the baseline, which is always there.

    Raises:
        ConfigError: for a name that is none.
    """
    known = (BASELINE, *names.RECIPES, *names.CONTROLS)
    found = [name for part in text.split(",") if (name := part.strip())]
    for name in found:
        if name not in known:
            raise ConfigError(
                f"--recipes: {shown(name)!r} is not one of {', '.join(known)}{did_you_mean(name, known)}"
            )
        if found.count(name) > 1:
            raise ConfigError(f"--recipes names {name} twice")
    if not set(found) - set(names.CONTROLS):
        raise ConfigError(
            f"--recipes={text}: names nothing to compare; name some of {BASELINE}, {', '.join(names.RECIPES)}"
        )
    return tuple(name for name in found if name != BASELINE)


def make_plan(
    *,
    out: Path,
    recipes: Sequence[str],
    seeds: int,
    steps: int | None,
    control: bool,
    options: Sequence[str],
    environ: Mapping[str, str],
    gpus: int,
    cores: int,
    threads: int | None,
    command: Sequence[str],
) -> Plan:
    """The plan for `recipes` and `seeds` seeds of the baseline, each run checked as a start of it would be.

    steps: None takes the configuration's. options: flags of training, for all runs.

    Raises:
        ConfigError: for what cannot run, or if `out` has a comparison of something else.
    """
    if environ.get("NNODES", "").strip() not in ("", "1"):
        raise ConfigError(
            f"NNODES={environ['NNODES']}: octavo compare starts runs on one machine; on several, train in "
            "each recipe by ./run_train.sh, and compare the folders: octavo compare RUN_A RUN_B …"
        )
    options = tuple(launcher.with_config_file(options, environ))
    job = config.load(options)
    _refuse_ours(job)
    options = tuple(flag.canonical for flag in flags.scan(options)[0])
    plan = Plan(
        out=out,
        runs=tuple(_runs(recipes, seeds, control, job.training.seed)),
        steps=job.training.steps if steps is None else steps,
        data_seed=job.training.seed if job.training.data_seed is None else job.training.data_seed,
        options=options,
        config=_computed(job),
        processes=launcher.processes_wanted(environ, gpus),
        threads=threads,
        command=shlex.join(["octavo", "compare", *command]),
    )
    for run in plan.runs:
        launcher.plan(plan.flags(run), environ, gpus=gpus, cores=cores)
    return plan


def _refuse_ours(job: JobConfig) -> None:
    problems = [
        f"{job.where[key]}: octavo compare sets this itself; {instead}"
        for key, instead in _OURS.items()
        if job.given.get(key) == "cli"
    ]
    problems += [
        f"{named(job, key)}: a comparison trains and saves; set it to false"
        for key in _MUST_BE_OFF
        if get(job, key)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _runs(recipes: Sequence[str], seeds: int, control: bool, seed: int) -> Iterator[Run]:
    yield Run(BASELINE, "baseline", None, seed)
    for recipe in recipes:
        if recipe not in names.CONTROLS:
            yield Run(recipe, "recipe", recipe, seed)
    for other in range(seed + 1, seed + seeds):
        yield Run(f"{BASELINE}_seed{other}", "seed", None, other)
    if control or CONTROL in recipes:
        yield Run(CONTROL, "control", CONTROL, seed)


def _computed(job: JobConfig) -> dict[str, dict[str, Any]]:
    """The part of a configuration that decides the losses of its runs; measuring health changes none."""
    ours = {tuple(key.split(".")) for key in _OURS}
    found = {
        section: {
            key: value
            for key, value in values.items()
            if (section, key) not in ours and not (section == "float8" and key.startswith("health_"))
        }
        for section, values in job.to_dict().items()
        if section not in _NOT_THE_MATHS
    }
    found["checkpoint"] = {"initial_load_path": job.checkpoint.initial_load_path}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found))  # as it is read back
    return plain


def remember(plan: Plan) -> None:
    """Write the plan into its folder; or, where one is there already, see that it is the same comparison.

    Raises:
        ConfigError: naming what differs.
    """
    path = plan.out / PLAN_FILE
    there = read_plan(plan.out)
    if there is not None:
        changed = _changes(there, plan)
        if changed:
            raise ConfigError(
                f"{plan.out} holds a comparison of another configuration: {'; '.join(changed)}. Name another "
                "--out, or go on with the one that is there"
            )
    made = plan.to_json()
    if there is not None:  # runs that this command leaves out stay in the report
        told = {run["name"] for run in made["runs"]}
        made["runs"] += [run for run in there["runs"] if run["name"] not in told]
    write_file(path, json.dumps(made, indent=1) + "\n")


def read_plan(out: Path) -> dict[str, Any] | None:
    """What `remember` wrote into `out`, None if nothing is there.

    Raises:
        ConfigError: if it cannot be read.
    """
    path = out / PLAN_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return found


def _changes(there: Mapping[str, Any], plan: Plan) -> list[str]:
    """In words, what `plan` computes otherwise than the comparison that is there."""
    pairs = [
        ("--steps", there["steps"], plan.steps),
        ("processes (NGPU)", there["processes"], plan.processes),
    ]
    for section, values in plan.config.items():
        before = there["config"].get(section, {})
        # A key that only one of two versions of octavo has says nothing.
        pairs += [(f"{section}.{key}", before[key], value) for key, value in values.items() if key in before]
    return [f"{name} was {shown(old)} and is {shown(new)}" for name, old, new in pairs if old != new]
