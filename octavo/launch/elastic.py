"""Run the training processes until they end, and tell how they ended.

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
from octavo.launch import local_processes
from octavo.launch.heartbeat import Meeting, Peers
from octavo.launch.local_processes import Failures
from octavo.launch.status import (
    Status,
    asked_to_stop,
    read_all,
    stacks_path,
)
from octavo.launch.supervisor import Supervisor


@dataclass(frozen=True)
class Launch:
    """What is started: Python with the arguments `command`, in so many `local` processes on this machine, and
    what the environment must hold before torch is imported.

    rendezvous: torchrun's options on how the machines meet, if there are several. processes: in all, on every
    machine. options: the job's, with the config file among them.
    """

    command: tuple[str, ...]
    local: int
    rendezvous: tuple[str, ...]
    processes: int
    options: tuple[str, ...]
    environment: Mapping[str, str]
    shown_ranks: frozenset[int]
    dump_folder: str
    meeting: Meeting | None = None
    """Where launchers meet, if there are several."""


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
            supervisor = stack.enter_context(Supervisor(logs))
            peers = None
            if launch.meeting is not None:
                _import_torch_quietly()
                peers = Peers(launch.meeting, supervisor.look, supervisor.end_for_others)
                stack.enter_context(peers)
            try:
                if launch.meeting is None:
                    failures = local_processes.run(launch.command, launch.local, launch.shown_ranks, logs)
                else:
                    failures = _torchrun(_arguments(launch, logs))
            except _NotMet as error:
                assert launch.meeting is not None
                assert peers is not None
                print(_unmet(launch.meeting, peers, str(error)), file=sys.stderr)
                return exit_codes.FAILED
            if supervisor.ended_at_once is not None:
                return exit_codes.of_signal(supervisor.ended_at_once)
            if not failures:
                if peers is not None:
                    peers.over(None, failed=False)
                return exit_codes.DONE
            code, keep_logs = _failed(launch, logs, failures, supervisor, peers)
        return code
    finally:
        if not keep_logs:
            shutil.rmtree(logs, ignore_errors=True)


def _import_torch_quietly() -> None:
    """The store says in C++, with its stack, that a launcher has left; we say so in a sentence. The processes
    that are started keep their warnings.
    """
    name = "TORCH_CPP_LOG_LEVEL"  # read once, at the import
    chosen = os.environ.get(name)
    os.environ[name] = chosen or "ERROR"
    importlib.import_module("torch.distributed")
    if chosen is None:
        del os.environ[name]


class _NotMet(Exception):
    """torchrun's agents did not find each other, or lost the one that holds their store."""


def _unmet(meeting: Meeting, peers: Peers, reason: str) -> str:
    elsewhere = peers.cause()
    if elsewhere is not None:
        return f"octavo: the job ends because of another machine: {elsewhere}"
    return (
        f"octavo: the {meeting.machines} machines did not meet at {meeting.host}:{meeting.port} within "
        f"{meeting.timeout:g} s (RDZV_TIMEOUT): {reason}"
    )


def _failed(
    launch: Launch,
    logs: Path,
    failures: Failures,
    supervisor: Supervisor,
    peers: Peers | None,
) -> tuple[int, bool]:
    """Tell why; returns the exit code, and whether the processes' output is worth keeping."""
    rank = _culprit(failures, supervisor, logs)
    local_rank, exitcode = failures.get(rank, (None, 0))
    code = _code(rank, exitcode, logs)
    agreed = code in exit_codes.AGREED or _stopped_by_signal(code, logs)
    told = code in exit_codes.SAID or agreed
    follows = supervisor.for_others or any(one.follows for one in read_all(logs) if one.rank == rank)
    elsewhere = None
    if peers is not None:
        if follows and not told:
            elsewhere = peers.cause()
        reason = None if told or follows else f"rank {rank} ended with {_ended(rank, exitcode, logs)}"
        peers.over(reason, failed=True)
    if supervisor.for_others and not told:
        code = exit_codes.FAILED  # not that of our own kill
    if (
        local_rank is not None
        and local_rank not in launch.shown_ranks
        and not agreed
        and not (told and _shown(logs, local_rank, launch.shown_ranks))
    ):
        print(_tail(logs, local_rank), end="", file=sys.stderr)
    if not told:
        if elsewhere is not None:
            print(f"octavo: the job ends because of another machine: {elsewhere}", file=sys.stderr)
        _tell(rank, exitcode, supervisor.killed, logs, Path(launch.dump_folder).expanduser())
    return code, not told


def _culprit(failures: Collection[int], supervisor: Supervisor, logs: Path) -> int:
    """The rank that ended the job, as far as can be told. One that has gone with exit code 0 is no failure to
    torchrun; those that missed it are. And the supervisor may have had no time to see who was first, since
    the others follow within milliseconds.
    """
    said = read_all(logs)
    later = {one.rank for one in said if one.follows} | {one.rank for one in supervisor.killed}
    seen = [one.rank for one in supervisor.deaths if one.rank not in failures]
    failed = [rank for rank in failures if rank not in later]
    unseen = [one.rank for one in said if not one.ended and one.rank not in {*later, *failures}]
    if supervisor.for_others:
        seen = unseen = []
    return next(iter([*seen, *failed, *unseen, *failures]))


def _arguments(launch: Launch, logs: Path) -> list[str]:
    return [
        f"--log-dir={logs}",
        *launch.rendezvous,
        f"--nproc-per-node={launch.local}",
        f"--local-ranks-filter={','.join(map(str, sorted(launch.shown_ranks)))}",
        "--role=rank",
        "--signals-to-handle=SIGQUIT",  # the others are the supervisor's
        "--tee=3",
        *launch.command,
    ]


def _torchrun(arguments: list[str]) -> Failures:
    """Run it; returns the processes that failed."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    # It reports each failed process as we do below, in words for torchrun's developers.
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
        raise _NotMet(str(error).strip().partition("\n")[0] or type(error).__name__) from None
    return {}


def _code(rank: int, exitcode: int, logs: Path) -> int:
    """What we end with because process `rank` ended with `exitcode` (negative: by that signal).

    One that left without having said so, by `os._exit` for instance, does not mean what its code means.
    """
    if exitcode < 0:
        return 128 - exitcode
    knew = any(status.rank == rank and status.ended for status in read_all(logs))
    return exitcode if knew and exitcode > 0 else exit_codes.FAILED


def _stopped_by_signal(code: int, logs: Path) -> bool:
    """Whether the processes left on a signal that the launcher passed on, having saved nothing."""
    number = asked_to_stop(logs)
    return number is not None and code == exit_codes.of_signal(number)


def _tell(rank: int, exitcode: int, killed: Sequence[Status], logs: Path, dump_folder: Path) -> None:
    """How the run came to its end, in one message; stacks are copied to where the run's files are."""
    own = stacks_path(logs, rank)
    hung = own.exists() and own.read_text().startswith("Timeout (")
    told = [f"octavo: rank {rank} ended with {_ended(rank, exitcode, logs)}"]
    if hung:
        told.append(
            "no progress within comm.train_timeout_seconds (in the first step: comm.init_timeout_seconds)"
        )
    if killed:
        told.append(f"still there and killed: {', '.join(map(str, killed))}")
    ranks = [status.rank for status in read_all(logs)]
    stacks = [path for path in logs.glob("rank*.stacks") if path.stat().st_size]
    without = [str(one) for one in ranks if stacks_path(logs, one) not in stacks]
    if stacks:
        folder = dump_folder / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        for path in stacks:
            shutil.copy(path, folder / path.with_suffix(".txt").name)
        told.append(f"Python stacks: {folder}{f' (none of {_ranks(without)})' if without else ''}")
    elif killed:
        told.append(f"no Python stacks of {_ranks(without)}")
    told.append(f"output of all ranks: {logs}")
    print("; ".join(told), file=sys.stderr)


def _ended(rank: int, exitcode: int, logs: Path) -> str:
    """With what, and in which step."""
    said = next((status for status in read_all(logs) if status.rank == rank), None)
    return f"{_ending(exitcode)}{f' {said.place}' if said else ''}"


def _ending(exitcode: int) -> str:
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


def _shown(logs: Path, local_rank: int, shown_ranks: Collection[int]) -> bool:
    """Whether a rank whose output is shown has given the reason that this hidden one gives: as a rule all
    find the same. One that it alone has found, in its data, say, would not be seen anywhere else.
    """
    reasons = {line for line in _stderr(logs, local_rank) if line.startswith("octavo: ")}
    seen = {line for shown in shown_ranks for line in _stderr(logs, shown)}
    return bool(reasons) and reasons <= seen


def _tail(logs: Path, local_rank: int, lines: int = 30) -> str:
    """The last lines that a process wrote to its standard error."""
    return "".join(f"[rank{local_rank}]:{line}\n" for line in _stderr(logs, local_rank)[-lines:])
