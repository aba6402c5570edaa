"""Runs the training processes until they end, and reports how they ended.

On one machine the launcher starts them itself (`local_processes.py`). On several, torchrun starts them, since
its agents find each other; torch is imported here for that alone. torchrun runs in this process, not in a new
one, so that the exit code of the first failed process becomes ours (torchrun itself always returns 1) and the
last lines of a failed process can be shown although LOG_RANK had hidden them. The `Supervisor` handles
signals and deaths, because it knows what a save needs.
"""

import importlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from octavo.core import exit_codes
from octavo.core.environment import LAUNCHER_VARIABLE, STATUS_VARIABLE
from octavo.core.fs import write_file
from octavo.core.terminal import for_terminal
from octavo.launch import local_processes
from octavo.launch.heartbeat import Heartbeat, Rendezvous
from octavo.launch.local_processes import Failures
from octavo.launch.status import Status, stacks_path
from octavo.launch.supervisor import Supervisor


@dataclass(frozen=True)
class Launch:
    """What to start: Python with the arguments `command`, in `local` processes on this machine.

    torchrun_options: how the machines meet, if there are several. processes: of all machines together.
    options: the job's, including the config file. environment: set before torch is imported.
    """

    command: tuple[str, ...]
    local: int
    torchrun_options: tuple[str, ...]
    processes: int
    options: tuple[str, ...]
    environment: Mapping[str, str]
    shown_ranks: frozenset[int]
    dump_folder: str
    rendezvous: Rendezvous | None = None
    """Where the launchers meet, if there are several machines."""


def run(launch: Launch) -> int:
    """Start the processes, and wait until training ends.

    Returns 0, or the exit code of the first process that failed (128 + the signal that ended it).
    """
    if isinstance(sys.stdout, TextIOWrapper):  # or what processes print waits in a pipe until the end
        sys.stdout.reconfigure(line_buffering=True)
    logs = Path(tempfile.mkdtemp(prefix="octavo-logs-"))
    os.environ.update(launch.environment)
    os.environ[STATUS_VARIABLE] = str(logs)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    keep_logs = False
    try:
        with ExitStack() as stack:
            limit = None if launch.rendezvous is None else launch.rendezvous.timeout
            supervisor = stack.enter_context(Supervisor(logs, limit))
            heartbeat = None
            if launch.rendezvous is not None:
                _import_torch_quietly()
                heartbeat = Heartbeat(
                    launch.rendezvous, supervisor.snapshot, supervisor.end_for_another_machine
                )
                stack.enter_context(heartbeat)
            try:
                if launch.rendezvous is None:
                    failures = local_processes.run(launch.command, launch.local, launch.shown_ranks, logs)
                else:
                    failures = _torchrun(_arguments(launch, logs))
            except _RendezvousFailed as error:
                assert launch.rendezvous is not None
                assert heartbeat is not None
                print(
                    for_terminal(_describe_failed_rendezvous(launch.rendezvous, heartbeat, str(error))),
                    file=sys.stderr,
                )
                return exit_codes.FAILED
            if supervisor.ended_at_once is not None:
                return exit_codes.of_signal(supervisor.ended_at_once)
            if not failures:
                if heartbeat is not None:
                    heartbeat.over(None, failed=False)
                return exit_codes.DONE
            code, keep_logs = _report(launch, logs, failures, supervisor, heartbeat)
        return code
    finally:
        if not keep_logs:
            shutil.rmtree(logs, ignore_errors=True)


def _import_torch_quietly() -> None:
    """Import torch.distributed without its C++ warnings: the store would print a stack when a launcher
    leaves, which is reported in a sentence instead. The training processes keep their warnings.
    """
    name = "TORCH_CPP_LOG_LEVEL"  # read once, at the import
    chosen = os.environ.get(name)
    os.environ[name] = chosen or "ERROR"
    importlib.import_module("torch.distributed")
    if chosen is None:
        del os.environ[name]


class _RendezvousFailed(Exception):
    """torchrun's agents did not find each other, or lost the one that hosts their store."""


def _describe_failed_rendezvous(rendezvous: Rendezvous, heartbeat: Heartbeat, reason: str) -> str:
    elsewhere = heartbeat.cause()
    if elsewhere is not None:
        return f"octavo: the job ends because of another machine: {elsewhere}"
    address = f"{rendezvous.host}:{rendezvous.port}"
    return (
        f"octavo: the {rendezvous.machines} machines did not meet at {address} within "
        f"{rendezvous.timeout:g} s (RDZV_TIMEOUT): {reason}"
    )


def _report(
    launch: Launch,
    logs: Path,
    failures: Failures,
    supervisor: Supervisor,
    heartbeat: Heartbeat | None,
) -> tuple[int, bool]:
    """Report the failure. Returns the exit code, and whether to keep the processes' output."""
    said = supervisor.statuses()
    rank = _first_failed_rank(failures, supervisor, said)
    status = next((one for one in said if one.rank == rank), None)
    local_rank, exitcode = failures.get(rank, (None, 0))
    code = _code(exitcode, status)
    stopped = supervisor.signal is not None and code == exit_codes.of_signal(supervisor.signal)
    agreed = code in exit_codes.COLLECTIVE or stopped
    self_reported = code in exit_codes.SELF_REPORTED or agreed
    follows = supervisor.for_another_machine or (status is not None and status.follows)
    elsewhere = None
    if heartbeat is not None:
        if follows and not self_reported:
            elsewhere = heartbeat.cause()
        reason = (
            None if self_reported or follows else f"rank {rank} ended with {_describe_exit(exitcode, status)}"
        )
        heartbeat.over(reason, failed=True)
    if supervisor.for_another_machine and not self_reported:
        code = exit_codes.FAILED  # not that of our own kill
    if (
        local_rank is not None
        and local_rank not in launch.shown_ranks
        and not agreed
        and not (self_reported and _reason_is_shown(logs, local_rank, launch.shown_ranks))
    ):
        print(_tail(logs, local_rank), end="", file=sys.stderr)
    if not self_reported:
        if elsewhere is not None:
            reason = for_terminal(f"octavo: the job ends because of another machine: {elsewhere}")
            print(reason, file=sys.stderr)
        ended = f"octavo: rank {rank} ended with {_describe_exit(exitcode, status)}"
        _report_failure(ended, rank, said, supervisor.killed, logs, Path(launch.dump_folder).expanduser())
    return code, not self_reported


def _first_failed_rank(failures: Collection[int], supervisor: Supervisor, said: Sequence[Status]) -> int:
    """The rank that ended the job, as far as is known.

    torchrun does not count a rank that left with exit code 0 as failed, but those that then missed it. And
    the supervisor may not have seen who was first, because the others follow within milliseconds.
    """
    later = {one.rank for one in said if one.follows} | {one.rank for one in supervisor.killed}
    seen = [one.rank for one in supervisor.deaths if one.rank not in failures]
    failed = [rank for rank in failures if rank not in later]
    unseen = [one.rank for one in said if not one.ended and one.rank not in {*later, *failures}]
    if supervisor.for_another_machine:
        seen = unseen = []
    return next(iter([*seen, *failed, *unseen, *failures]))


def _arguments(launch: Launch, logs: Path) -> list[str]:
    return [
        f"--log-dir={logs}",
        *launch.torchrun_options,
        f"--nproc-per-node={launch.local}",
        f"--local-ranks-filter={','.join(map(str, sorted(launch.shown_ranks)))}",
        "--role=rank",
        "--signals-to-handle=SIGQUIT",  # the others are the supervisor's
        "--tee=3",
        *launch.command,
    ]


def _torchrun(arguments: list[str]) -> Failures:
    """Run torchrun; returns the processes that failed."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    # Its report of failed processes is for torchrun's developers; ours is below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        first, _ = error.get_first_failure()
        ranks = sorted(error.failures, key=lambda rank: rank != first)
        return {rank: (error.failures[rank].local_rank, error.failures[rank].exitcode) for rank in ranks}
    except SignalException as error:  # SIGQUIT
        raise SystemExit(exit_codes.of_signal(int(error.sigval))) from None
    except (RendezvousError, DistError) as error:
        raise _RendezvousFailed(str(error).strip().partition("\n")[0] or type(error).__name__) from None
    return {}


def _code(exitcode: int, status: Status | None) -> int:
    """Our exit code, given that a process with the last `status` ended with `exitcode` (negative: by that
    signal).

    The code of a process that did not announce its end, for instance by `os._exit`, has no meaning of ours.
    """
    if exitcode < 0:
        return 128 - exitcode
    knew = status is not None and status.ended
    return exitcode if knew and exitcode > 0 else exit_codes.FAILED


def _report_failure(
    ended: str,
    rank: int,
    said: Sequence[Status],
    killed: Sequence[Status],
    logs: Path,
    dump_folder: Path,
) -> None:
    """Print how the run `ended`, by `rank`, in one message, and copy Python stacks to the run's folder."""
    own = stacks_path(logs, rank)
    hung = own.exists() and own.read_text().startswith("Timeout (")
    parts = [ended]
    if hung:
        parts.append(
            "no progress within comm.train_timeout_seconds (in the first step: comm.init_timeout_seconds)"
        )
    if killed:
        parts.append(f"still running and killed: {', '.join(map(str, killed))}")
    ranks = [status.rank for status in said]
    stacks = [path for path in logs.glob("rank*.stacks") if path.stat().st_size]
    without = [str(one) for one in ranks if stacks_path(logs, one) not in stacks]
    if stacks:
        folder = dump_folder / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        for path in stacks:
            write_file(folder / path.with_suffix(".txt").name, path.read_text(errors="replace"))
        parts.append(f"Python stacks: {folder}{f' (none of {_ranks(without)})' if without else ''}")
    elif killed:
        parts.append(f"no Python stacks of {_ranks(without)}")
    parts.append(f"output of all ranks: {logs}")
    print("; ".join(parts), file=sys.stderr)


def _describe_exit(exitcode: int, status: Status | None) -> str:
    """The exit code or signal, and the step."""
    return f"{_describe_code(exitcode)}{f' {status.place}' if status else ''}"


def _describe_code(exitcode: int) -> str:
    if exitcode == 0:
        return "exit code 0 before the run was over"
    if exitcode >= 0:
        return f"exit code {exitcode}"
    killed = " (out of memory?)" if exitcode == -9 else ""
    return f"signal {-exitcode}{killed}"


def _ranks(numbers: Sequence[str]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(numbers)}"


def _stderr(logs: Path, local_rank: int) -> list[str]:
    files = sorted(logs.glob(f"*/attempt_*/{local_rank}/stderr.log"))
    return files[-1].read_text(errors="replace").splitlines() if files else []


def _reason_is_shown(logs: Path, local_rank: int, shown_ranks: Collection[int]) -> bool:
    """Whether a rank whose output is shown has printed the same reason as this hidden one. Usually all ranks
    fail alike, but an error in one rank's data, for instance, is printed by that rank only.
    """
    reasons = {line for line in _stderr(logs, local_rank) if line.startswith("octavo: ")}
    seen = {line for shown in shown_ranks for line in _stderr(logs, shown)}
    return bool(reasons) and reasons <= seen


def _tail(logs: Path, local_rank: int, lines: int = 30) -> str:
    """The last lines that a process wrote to its standard error."""
    return "".join(f"[rank{local_rank}]:{line}\n" for line in _stderr(logs, local_rank)[-lines:])
