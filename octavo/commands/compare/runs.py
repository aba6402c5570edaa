"""Plans the runs of a comparison and their flags.

One configuration is trained once in each recipe, and in high precision with several seeds. The seed
determines the initial weights; all runs read the same batches in the same order (training.data_seed). So a
recipe's run differs from the baseline only by its casts, the baseline's runs differ only by their random
initial weights, and the noise of the batches, which is far larger, cancels in every difference. One more run,
the negative control, uses a recipe that is known to train badly.

The plan is saved in the comparison's folder. The same command continues it, and more recipes and seeds can be
added. Any other change of what is computed is an error.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from octavo import __version__, config
from octavo.config import ConfigError, JobConfig, flags, names
from octavo.config.schema import OPTIONS
from octavo.config.values import shown
from octavo.core.errors import did_you_mean
from octavo.core.fs import write_file
from octavo.launch import launcher

BASELINE = "bf16"
"""The name of the runs without float8. The dtype that they compute in depends on the device."""

CONTROL = names.CONTROLS[0]
CONTROL_STEPS = 100
"""The control ends after half of the steps, at least this many: enough to leave the noise band."""

PLAN_FILE = "comparison.json"
CHECKPOINTS = "checkpoint"

Kind = Literal["baseline", "seed", "recipe", "control"]

_SET_BY_COMPARE = {
    "training.steps": "use --steps",
    "job.dump_folder": "use --out",
    "model.converters": "use --recipes",
    "float8.recipe_name": "use --recipes",
    "checkpoint.enable": "a comparison always saves, to resume after an interruption",
    "checkpoint.folder": "each run has its own",
    "checkpoint.load_step": "a comparison starts at step 1",
    "checkpoint.load_only": "a comparison always saves, to resume after an interruption",
    "checkpoint.create_seed_checkpoint": "a comparison trains",
    "metrics.log_freq": "a comparison reads every step",
}
"""Keys that a comparison sets itself, and what to do instead."""

_MUST_BE_OFF = ("checkpoint.load_only", "checkpoint.create_seed_checkpoint")

_GATHER = "enable_fsdp_float8_all_gather"
_GATHER_FLAGS = (f"--float8.{_GATHER}", "--float8.precompute_float8_dynamic_scale_for_fsdp")
"""Not for the control, whose weights are not scaled and so cannot be gathered in float8."""


@dataclass(frozen=True)
class Run:
    """One run. name: also of its folder. recipe: None is high precision."""

    name: str
    kind: Kind
    recipe: str | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """A comparison: `runs` of one configuration, in the folder `out`.

    options: flags that all runs share. processes: per run. threads: per process, None for the launcher's
    choice.
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
        return self.out / "runs" / run.name

    def steps_of(self, run: Run) -> int:
        """The step after which `run` is finished; its schedule is that of all `steps`."""
        if run.kind != "control":
            return self.steps
        return min(self.steps, max(self.steps // 2, CONTROL_STEPS))

    def flags(self, run: Run) -> tuple[str, ...]:
        """The training flags of `run`; `./run_train.sh` with them reproduces it."""
        float8 = run.recipe is not None
        own = [
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
            own.append(f"--float8.recipe_name={run.recipe}")
        shared = [flag for flag in self.options if float8 or not flag.startswith("--float8.")]
        if run.kind == "control" and self.processes > 1 and self.config["float8"][_GATHER]:
            shared = [flag for flag in shared if not flag.startswith(_GATHER_FLAGS)]
            own.append(f"--float8.no_{_GATHER}")
        given = config.load(shared).given
        if given.get("checkpoint.interval") != "cli":  # one in a config file is meant for long runs
            own.append(f"--checkpoint.interval={self.interval}")
        if "checkpoint.keep_latest_k" not in given:
            own.append("--checkpoint.keep_latest_k=2")
        if float8 and self.measures_health:
            if "float8.health_every" not in given:
                own.append(f"--float8.health_every={self.interval}")
            if "float8.health_tokens" not in given and config.load([*shared, *own]).float8.health_every:
                own.append("--float8.health_tokens=0")
        return (*shared, *own)

    @property
    def interval(self) -> int:
        """Default steps between checkpoints and between health measurements: at most ten of each per run."""
        return max(10, self.steps // 10)

    @property
    def measures_health(self) -> bool:
        """Whether any step is measured, and each process has whole operands to measure."""
        layout = self.config["parallelism"]
        split = any(layout[f"{axis}_parallel_degree"] > 1 for axis in ("tensor", "pipeline"))
        return not split and self.interval <= self.steps

    def to_json(self) -> dict[str, Any]:
        """The content of `PLAN_FILE`."""
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
    """Parse a comma-separated list of recipes; the baseline is always included, so it is not returned.

    Raises:
        ConfigError: for an unknown or repeated name, or no recipe.
    """
    known = (BASELINE, *names.RECIPES, *names.CONTROLS)
    recipes = [name for part in text.split(",") if (name := part.strip())]
    for name in recipes:
        if name not in known:
            raise ConfigError(
                f"--recipes: {shown(name)!r} is not one of {', '.join(known)}{did_you_mean(name, known)}"
            )
        if recipes.count(name) > 1:
            raise ConfigError(f"--recipes names {name} twice")
    if not set(recipes) - set(names.CONTROLS):
        raise ConfigError(
            f"--recipes={text}: names nothing to compare; name some of {BASELINE}, {', '.join(names.RECIPES)}"
        )
    return tuple(name for name in recipes if name != BASELINE)


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
    """Plan runs for `recipes` and `seeds` seeds of the baseline, and validate each as its launcher would.

    steps: None takes the configuration's. options: training flags for all runs.

    Raises:
        ConfigError: a run is invalid.
    """
    if environ.get("NNODES", "").strip() not in ("", "1"):
        raise ConfigError(
            f"NNODES={environ['NNODES']}: octavo compare starts runs on one machine; on several, train each "
            "recipe with ./run_train.sh, and compare the folders: octavo compare RUN_A RUN_B …"
        )
    options = tuple(launcher.with_config_file(options, environ))
    job = config.load(options)
    _refuse_own_keys(job)
    options = tuple(setting.flag for setting in flags.read(options)[0])
    plan = Plan(
        out=out,
        runs=tuple(_runs(recipes, seeds, control, job.training.seed)),
        steps=job.training.steps if steps is None else steps,
        data_seed=job.training.seed if job.training.data_seed is None else job.training.data_seed,
        options=options,
        config=_loss_settings(job),
        processes=launcher.processes_wanted(environ, gpus),
        threads=threads,
        command=shlex.join(["octavo", "compare", *command]),
    )
    for run in plan.runs:
        launcher.plan(plan.flags(run), environ, gpus=gpus, cores=cores)
    return plan


def _refuse_own_keys(job: JobConfig) -> None:
    problems = [
        f"{job.where[key]}: octavo compare sets this itself; {instead}"
        for key, instead in _SET_BY_COMPARE.items()
        if job.given.get(key) == "cli"
    ]
    problems += [
        f"{job.named(key)}: a comparison trains and saves; set it to false"
        for key in _MUST_BE_OFF
        if job.get(key)
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


def _loss_settings(job: JobConfig) -> dict[str, dict[str, Any]]:
    """The part of a configuration that determines the losses of all runs."""
    settings: dict[str, dict[str, Any]] = {}
    values = job.to_dict()
    for name, option in OPTIONS.items():
        if option.changes_loss and name not in _SET_BY_COMPARE:
            settings.setdefault(option.section, {})[option.key] = values[option.section][option.key]
    as_read_back: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))
    return as_read_back


def save_plan(plan: Plan) -> None:
    """Write the plan into its folder. If the folder has a plan of the same comparison, runs are added to it.

    Raises:
        ConfigError: the folder has another comparison; the message names what differs.
    """
    content = plan.to_json()
    existing = read_plan(plan.out)
    if existing is not None:
        changes = _changes(existing, plan)
        if changes:
            raise ConfigError(
                f"{plan.out} holds a comparison of another configuration: {'; '.join(changes)}. Name another "
                "--out, or use the configuration of the existing one"
            )
        planned = {run["name"] for run in content["runs"]}
        content["runs"] += [run for run in existing["runs"] if run["name"] not in planned]
    write_file(plan.out / PLAN_FILE, json.dumps(content, indent=1) + "\n")


def read_plan(out: Path) -> dict[str, Any] | None:
    """Read what `save_plan` wrote into `out`; None if there is nothing.

    Raises:
        ConfigError: if it cannot be read.
    """
    path = out / PLAN_FILE
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return plan


def _changes(existing: Mapping[str, Any], plan: Plan) -> list[str]:
    """Describe the settings of `plan` that differ from the existing comparison's."""
    pairs = [
        ("--steps", existing["steps"], plan.steps),
        ("processes (NGPU)", existing["processes"], plan.processes),
    ]
    for section, values in plan.config.items():
        before = existing["config"].get(section, {})
        # Keys that only one version of octavo has are not compared.
        pairs += [(f"{section}.{key}", before[key], value) for key, value in values.items() if key in before]
    return [f"{name} was {shown(old)} and is {shown(new)}" for name, old, new in pairs if old != new]
