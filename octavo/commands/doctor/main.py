"""The command `octavo doctor`: look at everything, then say what it comes to."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from octavo import __version__
from octavo.commands.doctor import machine_checks, memory_checks
from octavo.commands.doctor.findings import Finding, Level, fail
from octavo.config import ConfigError, config_file, flags
from octavo.config.programs import octavo_command
from octavo.core import exit_codes
from octavo.launch import launcher

_EPILOG = """\
Further options are the job's own, as ./run_train.sh takes them: --training.compile,
--float8.recipe_name=rowwise. NGPU and the other variables of run_train.sh are heeded.

exit codes:
  0 ready, or doubtful where something is marked warn, 1 something is wrong with the machine,
  2 something is wrong with the job
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`octavo doctor`: the exit code."""
    parser = argparse.ArgumentParser(
        prog="octavo doctor",
        description="Look whether training works on this machine and, given a config, whether that job does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config-file",
        "--config_file",
        metavar="FILE",
        help="a training config: a path, or the name of a shipped one (also CONFIG_FILE, --job.config_file)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    own, options = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if own.config_file is not None:
        options = [f"--job.config_file={own.config_file}", *options]
    wants_job = bool(options or os.environ.get("CONFIG_FILE"))
    show = _silent if own.json else _print

    gpus = launcher.count_gpus(os.environ)
    with ExitStack() as stack:
        estimate = memory_checks.begin(options, gpus) if wants_job else None
        if estimate is not None:
            stack.callback(estimate.end)
        of_machine = show("Machine", machine_checks.look)
        of_float8 = show("Float8", _float8)
        of_job = show("Job", lambda: _job(options, gpus, estimate)) if wants_job else []

    code, verdict, command = _verdict([*of_machine, *of_float8], of_job, options, wants_job=wants_job)
    if own.json:
        sections = {"machine": of_machine, "float8": of_float8, "job": of_job}
        told = {
            name: [{**vars(f), "level": f.level.value} for f in findings]
            for name, findings in sections.items()
        }
        print(json.dumps({"verdict": verdict, "next": command, "exit_code": code, **told}, indent=2))
    else:
        print(f"\n{verdict}\nNext: {command}")
    return code


def _print(title: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    if title == "Machine":
        print(f"octavo {__version__}")
    print(f"\n{title}")
    found = []
    for finding in look():
        print(finding, flush=True)
        found.append(finding)
    return found


def _silent(title: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    return list(look())


def _float8() -> Iterable[Finding]:
    try:
        from octavo.commands.doctor import float8_checks
        from octavo.metrics.device import pick_device
    except Exception as error:  # whatever a missing or broken torch raises
        yield fail("float8", f"cannot be tried without a working torch ({_first_line(error)})")
        return
    yield from float8_checks.look(pick_device())


def _job(
    options: Sequence[str], gpus: int, estimate: memory_checks.MemoryEstimate | None
) -> Iterable[Finding]:
    try:
        from octavo.commands.doctor import job_checks
    except Exception as error:
        yield fail("job", f"cannot be looked at without a working torch ({_first_line(error)})")
        return
    yield from job_checks.look(options, gpus, estimate)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _verdict(
    of_machine: Sequence[Finding], of_job: Sequence[Finding], options: Sequence[str], *, wants_job: bool
) -> tuple[int, str, str]:
    """The exit code, a sentence, and the command to run next."""
    again = _typed(options, *shlex.split(octavo_command()), "doctor", *_right(options, of_job))
    for findings, code, whose in (
        (of_machine, exit_codes.FAILED, "this machine"),
        (of_job, exit_codes.USER_ERROR, "this job"),
    ):
        wrong = [finding for finding in findings if finding.level is Level.FAIL]
        if wrong:
            count = f"{len(wrong)} thing{'s' if len(wrong) > 1 else ''}"
            remedy = next((finding.remedy for finding in wrong if finding.remedy), "mend what is marked FAIL")
            return code, f"Not ready: {count} to mend in {whose}.", f"{remedy}; then {again}"
    notes = sum(finding.level is Level.NOTE for finding in (*of_machine, *of_job))
    suffix = f" ({notes} note{'s' if notes > 1 else ''} above)" if notes else ""
    warned = [finding for finding in (*of_machine, *of_job) if finding.level is Level.WARN]
    if warned:
        doubt = f"Doubtful: {'this job' if wants_job else 'training'} would start, but see the warning above."
        return exit_codes.DONE, doubt, f"{warned[0].remedy}; then {again}"
    ready = f"Ready: {'this job' if wants_job else 'the machine'} can train{suffix}."
    return exit_codes.DONE, ready, _train_command(options)


def _right(options: Sequence[str], found: Sequence[Finding]) -> list[str]:
    """`options` as they are to be given again: without those that are a mistake themselves, for which only
    the user can say what was meant. A config that was named without its flag gets it.
    """
    commands = ("pip install ", octavo_command())  # after which the job works as it was asked for
    wrong = [f for f in found if f.level is Level.FAIL and not f.remedy.startswith(commands)]
    read, problems = flags.scan(options)
    kept = [flag.canonical for flag in read if not flags.check_values([flag]) and not _blamed(flag, wrong)]
    if flags.config_file(read) is None:
        unflagged = (o for o in options if any(p.startswith(f"unexpected argument {o!r};") for p in problems))
        kept[:0] = [f"--config-file={word}" for word in unflagged if _is_config(word)][:1]
    return kept


def _blamed(flag: flags.Flag, wrong: Sequence[Finding]) -> bool:
    """Whether one of `wrong` says that its value comes from `flag`."""
    begins = (f"{flag.typed}:", f"{flag.typed}=")
    return any(f"({flag.typed})" in finding.told or finding.told.startswith(begins) for finding in wrong)


def _is_config(word: str) -> bool:
    try:
        return word.endswith(".toml") and config_file.find(word).is_file()
    except ConfigError:
        return False


def _train_command(options: Sequence[str]) -> str:
    script = Path(__file__).parents[3] / "run_train.sh"
    if not script.exists():  # an installed package
        return _typed(options, *shlex.split(octavo_command()), "train", *options)
    where = os.path.relpath(script)
    start = f".{os.sep}{where}" if not where.startswith("..") else str(script)
    return _typed(options, start, *options)


def _typed(options: Sequence[str], *words: str) -> str:
    """`words` as a command, after what of the environment makes the job of `options` what it is."""
    names = ["NGPU"]
    if flags.config_file(flags.scan(options)[0]) is None:  # which wins
        names.append("CONFIG_FILE")
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in names if os.environ.get(name)]
    return " ".join([*variables, shlex.join(words)])
