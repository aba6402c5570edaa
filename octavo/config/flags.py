"""The command line: `--section.key value` on top of a job, parsed by tyro.

tyro reads the dataclasses and parses the values. Before that, `scan` translates every accepted spelling into
one canonical flag (`-` or `_`, `--x.no-y`, `--no-x.y`, `--x.y=false`, aliases of a key, values that begin
with a dash), and suggests the nearest name for an unknown flag.


"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.config import lookup
from octavo.config.schema import SECTIONS, JobConfig
from octavo.config.values import BadValue, convert, metavar
from octavo.core.errors import ConfigError

_CONFIG_FILE = ("job", "config_file")
_HELP = ("-h", "--help")


@dataclass(frozen=True)
class Flag:
    """One flag as given: the key it sets, its value as text, and how it was typed."""

    section: str
    key: str
    text: str
    written: str
    typed: str

    @property
    def kind(self) -> Any:
        """The type of the key."""
        return SECTIONS[self.section][self.key]

    @property
    def canonical(self) -> str:
        """The one spelling that tyro knows."""
        if self.kind is bool:
            return f"--{self.section}.{'' if self.value() else 'no_'}{self.key}"
        return f"--{self.section}.{self.key}={self.text}"

    def value(self) -> Any:
        """The typed value; raises BadValue."""
        return convert(self.kind, self.text, text=True)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return any(token in _HELP for token in argv)


def scan(argv: Sequence[str]) -> tuple[list[Flag], list[str]]:
    """All flags in order, and one message for each token that is not a flag."""
    flags: list[Flag] = []
    problems: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        typed, equals, text = token.partition("=")
        if not typed.startswith("--") or typed == "--":
            problems.append(
                f"unexpected argument {token!r}; flags look like --section.key value (quote spaces)"
            )
            continue
        written, negated = _resolve(typed)
        home = lookup.resolve(*written) if written else None
        if written is None or home is None:
            problems.append(f"{typed}: {_explain(typed)}")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)  # the unknown flag's value, so that it is not a second error
            continue
        is_bool = SECTIONS[home[0]][home[1]] is bool
        if is_bool and not equals:
            text = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not rest or (rest[0].startswith("--") and _resolve(rest[0].partition("=")[0])[0] is not None):
                problems.append(f"{typed}: needs a value")
                continue
            text = rest.pop(0)
        if negated:
            if text.lower() not in ("true", "false"):
                problems.append(f"{typed}: expected true or false, got {text!r}")
                continue
            text = "false" if text.lower() == "true" else "true"
        flags.append(Flag(*home, text, ".".join(written), typed))
    return flags, problems


def config_file(flags: Sequence[Flag]) -> Flag | None:
    """The last flag that names the TOML file, or None."""
    named = [flag for flag in flags if (flag.section, flag.key) == _CONFIG_FILE]
    return named[-1] if named else None


def check_values(flags: Sequence[Flag]) -> list[str]:
    """One message for each flag with a wrong value."""
    problems = []
    for flag in flags:
        try:
            flag.value()
        except BadValue as error:
            problems.append(f"{flag.typed}: {error}")
    return problems


def apply(flags: Sequence[Flag], job: JobConfig, *, prog: str) -> JobConfig:
    """The job with the flags on top.

    Raises:
        ConfigError: with a line for each flag whose value is wrong.
    """
    try:
        return _tyro(job, [flag.canonical for flag in flags], prog)
    except BadValue:
        raise ConfigError("\n".join(check_values(flags))) from None


def print_help(*, prog: str) -> None:
    """Print every section and key with its help and default, and exit with 0."""
    _tyro(JobConfig(), ["--help"], prog)


def _resolve(typed: str) -> tuple[tuple[str, str] | None, bool]:
    """The (section, key) of a flag, or None if it names no key; whether it is the `no` form of a boolean."""
    name = lookup.normal(typed[2:])
    if name == "config_file":
        return _CONFIG_FILE, False
    section, _, key = name.partition(".")
    if lookup.resolve(section, key) is not None:
        return (section, key), False
    for positive in ((section, key.removeprefix("no_")), (section.removeprefix("no_"), key)):
        home = lookup.resolve(*positive)
        if home is not None and SECTIONS[home[0]][home[1]] is bool:
            return positive, True
    return None, False


def _explain(typed: str) -> str:
    section, dot, key = lookup.normal(typed[2:]).partition(".")
    if not dot:
        return f"unknown flag{lookup.suggest_for_bare(section, prefix='--')}"
    bare = (
        (section.removeprefix("no_"), key)
        if section.startswith("no_")
        else (section, key.removeprefix("no_"))
    )
    for candidate in ((section, key), bare):
        home = lookup.resolve(*candidate)
        if home is not None:
            return f"not a boolean, so it has no 'no' form; write --{candidate[0]}.{candidate[1]} VALUE"
    return lookup.explain_unknown(section, key, prefix="--")


def _tyro(job: JobConfig, args: list[str], prog: str) -> JobConfig:
    import tyro  # imported here: reading names and errors does not need it

    registry = tyro.constructors.ConstructorRegistry()
    kinds = [kind for keys in SECTIONS.values() for kind in keys.values()]

    @registry.primitive_rule
    def every_key(info: Any) -> Any:
        kind = info.type
        if kind is bool or kind not in kinds:
            return None  # left to tyro: the flag pair --x and --no_x, and types of no key
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar(kind),
            instance_from_str=lambda args: convert(kind, args[0], text=True),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [",".join(value) if isinstance(value, list) else str(value)],
        )

    return tyro.cli(
        JobConfig,
        args=args,
        default=job,
        prog=prog,
        registry=registry,
        use_underscores=True,
        description=_DESCRIPTION,
    )


_DESCRIPTION = (
    "Train a model. Values come from the command line, then from the TOML file (--job.config_file), "
    "then from the defaults below. Booleans are flags (--training.compile, --training.no-compile); lists are "
    "comma-separated; - and _ are the same."
)
