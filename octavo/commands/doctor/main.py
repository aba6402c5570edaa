"""The command `octavo doctor`: runs all checks, then prints a verdict and the next command."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from octavo import __version__
from octavo.commands.argparser import Parser
from octavo.commands.doctor import machine_checks, memory_checks
from octavo.commands.doctor.findings import Finding, Level, fail
from octavo.config import ConfigError, config_file, flags
from octavo.core import exit_codes
from octavo.core.format import count
from octavo.core.programs import octavo_command
from octavo.core.terminal import for_terminal
from octavo.launch import launcher

_EPILOG = """\
All other options are the job's, as for ./run_train.sh: --training.compile,
--float8.recipe_name=rowwise. NGPU and the other variables of run_train.sh apply.

exit codes:
  0 ready, or doubtful if a check is marked warn, 1 a problem with the machine, 2 a problem with the job
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo doctor`; returns the exit code."""
    parser = Parser(
        "octavo doctor",
        "Check whether this machine and, given a config, a job are ready for training.",
        _EPILOG,
    )
    parser.add_argument(
        "--config_file",
        metavar="FILE",
        help="a training config: a path, or the name of a shipped one (also CONFIG_FILE, --job.config_file)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    own, options = parser.read_known(sys.argv[1:] if argv is None else argv)
    if own.config_file is not None:
        options = [f"--job.config_file={own.config_file}", *options]
    has_job = bool(options or os.environ.get("CONFIG_FILE"))
    run = _collect if own.json else _print

    gpus = launcher.count_gpus(os.environ)
    with ExitStack() as stack:
        estimate = memory_checks.start_estimate(options, gpus) if has_job else None
        if estimate is not None:
            stack.callback(estimate.kill)
        machine = run("Machine", machine_checks.check_machine)
        float8 = run("Float8", _check_float8)
        job = run("Job", lambda: _check_job(options, gpus, estimate)) if has_job else []

    code, verdict, command = _verdict([*machine, *float8], job, options, has_job=has_job)
    if own.json:
        sections = {"machine": machine, "float8": float8, "job": job}
        findings = {name: [finding.as_json() for finding in section] for name, section in sections.items()}
        print(json.dumps({"verdict": verdict, "next": command, "exit_code": code, **findings}, indent=2))
    else:
        print(f"\n{verdict}\nNext: {command}")
    return code


def _print(title: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run `check`, and print its findings as they come."""
    if title == "Machine":
        print(f"octavo {__version__}")
    print(f"\n{title}")
    findings = []
    for finding in check():
        print(for_terminal(str(finding)), flush=True)
        findings.append(finding)
    return findings


def _collect(title: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    return list(check())


def _check_float8() -> Iterable[Finding]:
    try:
        from octavo.commands.doctor import float8_checks
        from octavo.metrics.device import pick_device
    except Exception as error:  # a missing or broken torch can raise anything
        return [fail("float8", f"cannot be checked without a working torch ({_first_line(error)})")]
    return float8_checks.check_float8(pick_device())


def _check_job(
    options: Sequence[str], gpus: int, estimate: memory_checks.MemoryEstimate | None
) -> Iterable[Finding]:
    try:
        from octavo.commands.doctor import job_checks
    except Exception as error:
        return [fail("job", f"cannot be checked without a working torch ({_first_line(error)})")]
    return job_checks.check_job(options, gpus, estimate)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _verdict(
    machine: Sequence[Finding], job: Sequence[Finding], options: Sequence[str], *, has_job: bool
) -> tuple[int, str, str]:
    """Return the exit code, a sentence, and the command to run next."""
    again = _command_line(options, *shlex.split(octavo_command()), "doctor", *_valid_options(options, job))
    for findings, code, owner in (
        (machine, exit_codes.FAILED, "this machine"),
        (job, exit_codes.USER_ERROR, "this job"),
    ):
        failures = [finding for finding in findings if finding.level is Level.FAIL]
        if failures:
            remedy = next((f.remedy for f in failures if f.remedy), "fix what is marked FAIL")
            verdict = f"Not ready: {count(len(failures), 'problem')} with {owner}."
            return code, verdict, f"{remedy}; then {again}"
    warnings = [finding for finding in (*machine, *job) if finding.level is Level.WARN]
    subject = "this job" if has_job else "the machine"
    if warnings:
        verdict = f"Doubtful: {subject} would start to train, but see the warning above."
        return exit_codes.DONE, verdict, f"{warnings[0].remedy}; then {again}"
    notes = sum(finding.level is Level.NOTE for finding in (*machine, *job))
    suffix = f" ({count(notes, 'note')} above)" if notes else ""
    return exit_codes.DONE, f"Ready: {subject} can train{suffix}.", _train_command(options)


def _valid_options(options: Sequence[str], findings: Sequence[Finding]) -> list[str]:
    """Return `options` for the next run, without those that are wrong and that only the user can correct. A
    config that was named without its flag gets the flag.
    """
    wrong = {f.where for f in findings if f.level is Level.FAIL and not f.valid}
    read, problems = flags.read(options)
    valid = [setting.flag for setting in read if setting.where not in wrong]
    if flags.config_file(read) is None:
        unflagged = (o for o in options if any(problem.where == o for problem in problems))
        valid[:0] = [f"--config-file={word}" for word in unflagged if _is_config(word)][:1]
    return valid


def _is_config(word: str) -> bool:
    try:
        return word.endswith(".toml") and config_file.find(word).is_file()
    except ConfigError:
        return False


def _train_command(options: Sequence[str]) -> str:
    script = Path(__file__).parents[3] / "run_train.sh"
    if not script.exists():  # an installed package
        return _command_line(options, *shlex.split(octavo_command()), "train", *options)
    relative = os.path.relpath(script)
    start = f".{os.sep}{relative}" if not relative.startswith("..") else str(script)
    return _command_line(options, start, *options)


def _command_line(options: Sequence[str], *words: str) -> str:
    """Quote `words` as a command, after the environment variables that the job of `options` depends on."""
    names = ["NGPU"]
    if flags.config_file(flags.read(options)[0]) is None:  # a flag overrides the variable
        names.append("CONFIG_FILE")
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in names if os.environ.get(name)]
    return " ".join([*variables, shlex.join(words)])
