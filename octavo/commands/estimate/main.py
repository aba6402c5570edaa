"""`octavo estimate`: memory, messages and time of a job on any number of GPUs, without one.

    octavo estimate --config-file llama3_70b.toml --ngpu 512 --training.compile
    octavo estimate --config-file llama3_8b.toml --ngpu 8 --device h200 --json
    octavo estimate --weak-scaling

Options of its own are --ngpu, --device, --json and --weak-scaling; all others are those of training. Exit
codes: 0 it fits, 1 it does not, 2 a mistake in the command line or the config, 3 it could not be traced.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo import config
from octavo.config import ConfigError
from octavo.roofline import Gpu, find_gpu

_OWN = {"ngpu": True, "device": True, "json": False, "weak_scaling": False}
"""Option -> whether it takes a value."""

DOES_NOT_FIT, NOT_TRACED = 1, 3

_HELP = """usage: octavo estimate [--config-file FILE] --ngpu N [--device NAME] [--json] [training's options]
       octavo estimate --weak-scaling [--device NAME] [--json]

Memory, messages and time of a job, without running it.

  --ngpu N          so many GPUs (processes)
  --device NAME     h100 (default), h200, b200, a100, mi300x, ... or cpu: as this machine's CPU would do it
  --json            one JSON object instead of a table
  --weak-scaling    tokens/s and MFU of Llama3 8B, 70B and 405B on 8 to 4096 GPUs, with a layout for each

All options of octavo train (octavo train --help) count as there. Exit codes: 0 it fits, 1 it does not, 2 a
mistake, 3 a process could not be traced in time."""


@dataclass
class _Options:
    """Its own options, and what is left for training's."""

    ngpu: int = 0
    gpu: Gpu | None = None
    json: bool = False
    weak_scaling: bool = False
    rest: list[str] = field(default_factory=list)


def _read(argv: Sequence[str]) -> _Options:
    given: dict[str, str] = {}
    options = _Options()
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key not in _OWN:
            options.rest.append(word)
            continue
        if not _OWN[key]:
            if equals:
                raise ConfigError(f"{name} takes no value")
            value = "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{name}: needs a value")
            value = words.pop(0)
        given[key] = value
    options.json, options.weak_scaling = "json" in given, "weak_scaling" in given
    options.gpu = _device(given.get("device", "h100"))
    if options.weak_scaling:
        idle = ["--ngpu"] if "ngpu" in given else options.rest[:1]
        if idle:
            raise ConfigError(f"{idle[0]} has no effect with --weak-scaling, which has jobs of its own")
        if options.gpu is None:
            raise ConfigError("--weak-scaling is about GPUs; name one in --device")
        return options
    if "ngpu" not in given:
        raise ConfigError("--ngpu is missing: on how many GPUs? (octavo estimate --help)")
    number = given["ngpu"]
    if not (number.isascii() and number.isdecimal() and len(number) < 7 and int(number) > 0):
        raise ConfigError(f"--ngpu: expected a whole number from 1 to 999999, got {number!r}")
    options.ngpu = int(number)
    return options


def _device(name: str) -> Gpu | None:
    if name.lower() == "cpu":
        return None
    try:
        return find_gpu(name)
    except ValueError as error:
        raise ConfigError(f"--device: {error}, cpu") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate what `argv` (default: the command line) says; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print(_HELP)
        return 0
    options = _read(argv)
    logging.getLogger("octavo").setLevel(logging.ERROR)
    if options.weak_scaling:
        from octavo.commands.estimate.weak_scaling import report

        assert options.gpu is not None
        print(report(options.gpu, as_json=options.json))
        return 0
    job = config.load(options.rest, prog="octavo estimate")
    gpus = 0 if options.gpu is None else options.ngpu
    config.check(job, world_size=options.ngpu, gpus=gpus, elsewhere=True)

    from octavo.commands.estimate.estimate_report import as_text, estimate
    from octavo.commands.estimate.forked import TraceFailed  # torch, after the config has been judged

    try:
        found = estimate(job, options.ngpu, options.gpu)
    except TraceFailed as error:
        print(f"octavo estimate: {error}", file=sys.stderr)
        return NOT_TRACED
    print(json.dumps(found.as_json(), indent=2) if options.json else as_text(found))
    return DOES_NOT_FIT if found.fits is False else 0
