"""From a command line to a `JobConfig`: defaults, then the TOML file, then the flags."""

from collections.abc import Iterable, Iterator, Sequence

from octavo.config import config_file, flags, layer_recipes, toml
from octavo.config.schema import JobConfig
from octavo.config.values import Setting, shown
from octavo.core.errors import ConfigError, Problem


def load(
    argv: Sequence[str], *, prog: str = "octavo train", problems: list[Problem] | None = None
) -> JobConfig:
    """Read a job from flags and from the TOML file that `--job.config_file` names (a path or a shipped name).

    Ranges, paths and divisibility are left to `check`. `-h` or `--help` among the flags prints the help and
    exits with 0. If a flag is given several times, the last one counts, so that a script's flags can be
    overridden; two spellings of one key must agree. With `problems`, errors are appended to that list, their
    values are left out of the job, and nothing is raised.

    Raises:
        ConfigError: one problem for each error in the file and on the command line.
    """
    if flags.wants_help(argv):
        from octavo.config.option_help import help_text

        print(help_text(prog), end="")
        raise SystemExit(0)
    given, wrong_flags = flags.read(argv)
    named = flags.config_file(given)
    in_file, wrong = _read_file(named) if named is not None else ([], [])
    wrong = [*wrong, *_contradictions(in_file), *wrong_flags, *_contradictions(given)]
    if wrong and problems is None:
        raise ConfigError(wrong)
    if problems is not None:
        problems += wrong

    job = JobConfig()
    for setting in (*in_file, *given):
        setattr(getattr(job, setting.section), setting.key, setting.value)
        job.given[setting.name] = setting.source
        job.where[setting.name] = setting.where
    if job.float8.layer_recipes_file is not None:
        _load_layer_recipes(job, job.float8.layer_recipes_file)
    return job


def _load_layer_recipes(job: JobConfig, path: str) -> None:
    """Set float8.layer_recipes to the content of the file `path`."""
    where = job.where[layer_recipes.FILE_KEY]
    try:
        setting = layer_recipes.read(path)
    except ConfigError as error:
        raise ConfigError(f"{where}={shown(path)}: {error}") from None
    if job.float8.layer_recipes not in ([], setting.value):
        given = job.where[layer_recipes.KEY]
        raise ConfigError(
            f"{given}: {layer_recipes.KEY} differs from the one in {path}; leave one of the two out"
        )
    job.float8.layer_recipes = setting.value
    job.given.setdefault(layer_recipes.KEY, "toml")
    job.where.setdefault(layer_recipes.KEY, setting.where)


def _read_file(named: Setting) -> tuple[list[Setting], list[Problem]]:
    try:
        path = config_file.find(named.text)
    except ConfigError as error:
        return [], [Problem(f"{named.where}={shown(named.text)}: {error}", key=named.name, where=named.where)]
    try:
        return toml.read(str(path))
    except ConfigError as error:
        return [], list(error.problems)


def _contradictions(settings: Iterable[Setting]) -> Iterator[Problem]:
    """A problem for each key whose two spellings have different values in one source."""
    last: dict[str, dict[str, Setting]] = {}
    for setting in settings:
        last.setdefault(setting.name, {})[setting.written] = setting
    for first, *others in (list(spellings.values()) for spellings in last.values()):
        for other in others:
            if other.value != first.value:
                yield Problem(
                    f"{other.where}: {other.written} = {shown(other.value)} contradicts {first.written} = "
                    f"{shown(first.value)} ({first.where}); the two are the same setting",
                    key=other.name,
                    where=other.where,
                )
