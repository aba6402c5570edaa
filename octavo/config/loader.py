"""From a command line to a `JobConfig`: defaults, then the TOML file, then the flags."""

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.config import config_file, flags, layer_recipes, toml
from octavo.config.ranges import shown
from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError


def load(argv: Sequence[str], *, prog: str = "octavo train", problems: list[str] | None = None) -> JobConfig:
    """Read a job from flags and from the TOML file that `--job.config_file` names (a path or a shipped name).

    Ranges, paths and divisibility are left to `check`. `-h` or `--help` among the flags prints the help and
    exits with 0. If a flag is given several times, the last one counts, so that a script's flags can be
    overridden; two spellings of one key must agree. With `problems`, errors are appended to that list, their
    values are left out of the job, and nothing is raised.

    Raises:
        ConfigError: one line for each error in the file and on the command line.
    """
    if flags.wants_help(argv):
        flags.print_help(prog=prog)
        raise SystemExit(0)
    given_flags, flag_problems = flags.scan(argv)
    bad_values = flags.check_values(given_flags)
    named = flags.config_file(given_flags)
    entries, wrong = _read_file(named) if named is not None else ([], [])
    wrong += _contradictions((e.section, e.key, e.value, e.written, e.where) for e in entries)
    wrong += flag_problems + bad_values
    given_flags = [flag for flag in given_flags if not flags.check_values([flag])]
    wrong += _contradictions((f.section, f.key, f.value(), f.written, f.typed) for f in given_flags)
    if wrong and problems is None:
        raise ConfigError("\n".join(wrong))
    if problems is not None:
        problems += wrong

    job = JobConfig()
    for entry in entries:
        setattr(getattr(job, entry.section), entry.key, entry.value)
    job = flags.apply(given_flags, job, prog=prog)
    for entry in entries:
        job.given[f"{entry.section}.{entry.key}"] = "toml"
        job.where[f"{entry.section}.{entry.key}"] = entry.where
    for flag in given_flags:
        job.given[f"{flag.section}.{flag.key}"] = "cli"
        job.where[f"{flag.section}.{flag.key}"] = flag.typed
    if job.float8.layer_recipes_file is not None:
        _load_layer_recipes(job, job.float8.layer_recipes_file)
    return job


def _load_layer_recipes(job: JobConfig, path: str) -> None:
    """Set float8.layer_recipes to the content of the file `path`."""
    where = job.where[layer_recipes.FILE_KEY]
    try:
        entry = layer_recipes.read(path)
    except ConfigError as error:
        raise ConfigError(f"{where}={shown(path)}: {error}") from None
    if job.float8.layer_recipes not in ([], entry.value):
        given = job.where[layer_recipes.KEY]
        raise ConfigError(
            f"{given}: {layer_recipes.KEY} differs from the one in {path}; leave one of the two out"
        )
    job.float8.layer_recipes = entry.value
    job.given.setdefault(layer_recipes.KEY, "toml")
    job.where.setdefault(layer_recipes.KEY, entry.where)


def _read_file(named: flags.Flag) -> tuple[list[toml.Entry], list[str]]:
    try:
        path = config_file.find(named.text)
    except ConfigError as error:
        return [], [f"{named.typed}={shown(named.text)}: {error}"]
    try:
        return toml.read(str(path))
    except ConfigError as error:
        return [], [str(error)]


def _contradictions(settings: Iterable[tuple[str, str, Any, str, str]]) -> list[str]:
    """One message for each key whose two spellings have different values in one source.

    `settings` are (section, key, value, the spelling's own "section.key", where).
    """
    last: dict[tuple[str, str], dict[str, tuple[Any, str]]] = {}
    for section, key, value, written, where in settings:
        last.setdefault((section, key), {})[written] = (value, where)
    problems = []
    for spellings in last.values():
        (first, (value, where)), *others = spellings.items()
        problems += [
            f"{other_where}: {other} = {shown(other_value)} contradicts {first} = {shown(value)} ({where}); "
            "the two are the same setting"
            for other, (other_value, other_where) in others
            if other_value != value
        ]
    return problems
