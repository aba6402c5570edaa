"""`octavo estimate`: predicts memory, messages and time of a job on any number of GPUs, without running it.

    octavo estimate --config-file llama3_70b.toml --ngpu 512 --training.compile
    octavo estimate --config-file llama3_8b.toml --ngpu 8 --device h200 --json
    octavo estimate --weak-scaling

All options but --ngpu, --device, --json and --weak-scaling are those of training. Exit codes: 0 the job fits,
1 it does not, 2 an error in the command line or the config, 3 a process could not be traced.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from octavo import config, preflight
from octavo.commands.argparser import Parser, bounded_int
from octavo.config import ConfigError
from octavo.core.terminal import for_terminal
from octavo.roofline import Gpu, find_gpu

DOES_NOT_FIT, NOT_TRACED = 1, 3


def _parser() -> Parser:
    parser = Parser(
        "octavo estimate",
        "Predict memory, messages and time of a job, without running it.",
        "All options of octavo train (octavo train --help) are accepted. Exit codes: 0 the job fits,\n"
        "1 it does not, 2 a usage error, 3 a process could not be traced in time.",
    )
    parser.add_argument("--ngpu", type=bounded_int(1, 999999), metavar="N", help="number of GPUs (processes)")
    parser.add_argument(
        "--device",
        default="h100",
        metavar="NAME",
        help="h100 (default), h200, b200, a100, mi300x, ... or cpu, which traces as on this machine's CPU",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--weak_scaling",
        action="store_true",
        help="tokens/s and MFU of Llama3 8B, 70B and 405B on 8 to 4096 GPUs, with a layout for each",
    )
    return parser


def _find_device(name: str) -> Gpu | None:
    if name.lower() == "cpu":
        return None
    try:
        return find_gpu(name)
    except ValueError as error:
        raise ConfigError(f"--device: {error}, cpu") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo estimate`; returns the exit code."""
    options, job_flags = _parser().read_known(sys.argv[1:] if argv is None else argv)
    gpu = _find_device(options.device)
    if options.weak_scaling:
        return _report_weak_scaling(options, job_flags, gpu)
    if options.ngpu is None:
        raise ConfigError("--ngpu is missing: on how many GPUs? (octavo estimate --help)")
    logging.getLogger("octavo").setLevel(logging.ERROR)
    job = config.load(job_flags, prog="octavo estimate")
    preflight.check(job, world_size=options.ngpu, gpus=options.ngpu if gpu else 0, elsewhere=True)

    # These import torch, so only after the config is checked.
    from octavo.commands.estimate.estimate_report import as_text, estimate
    from octavo.commands.estimate.forked_workers import TraceFailed

    try:
        result = estimate(job, options.ngpu, gpu)
    except TraceFailed as error:
        print(for_terminal(f"octavo estimate: {error}"), file=sys.stderr)
        return NOT_TRACED
    print(json.dumps(result.as_json(), indent=2) if options.json else as_text(result))
    return DOES_NOT_FIT if result.fits is False else 0


def _report_weak_scaling(options: argparse.Namespace, job_flags: Sequence[str], gpu: Gpu | None) -> int:
    unused = ["--ngpu"] if options.ngpu is not None else job_flags[:1]
    if unused:
        raise ConfigError(f"{unused[0]} has no effect with --weak-scaling, which has jobs of its own")
    if gpu is None:
        raise ConfigError("--weak-scaling is about GPUs; name one in --device")

    from octavo.commands.estimate.weak_scaling import report

    print(report(gpu, as_json=options.json))
    return 0
