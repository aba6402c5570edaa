"""Profiler traces and memory snapshots at fixed steps; off by default."""

import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from octavo.config.schema import Profiling
from octavo.core.fs import replacing
from octavo.core.logging import logger
from octavo.metrics.trace_summary import write_summary

_WARMUP, _ACTIVE = 3, 1  # profiled steps: discarded, recorded


def _trace_schedule(every: int) -> Callable[[int], torch.profiler.ProfilerAction]:
    warmup = min(_WARMUP, every - _ACTIVE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*won't be using warmup")  # profile_freq = 1 asks for that
        return torch.profiler.schedule(wait=every - warmup - _ACTIVE, warmup=warmup, active=_ACTIVE)


@contextmanager
def _traces(settings: Profiling, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Record a Chrome trace of every `profile_freq`-th step,
    `<folder>/iteration_<step>/rank<rank>_trace.json`, and write its summary to `rank<rank>_summary.txt`.
    """

    saved = 0

    def save(profiler: torch.profiler.profile) -> None:
        nonlocal saved
        if profiler.step_num % settings.profile_freq or profiler.step_num == saved:
            return  # training ended just after a recording began
        saved = profiler.step_num
        start = time.perf_counter()
        path = folder / f"iteration_{profiler.step_num}" / f"rank{rank}_trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link would be followed
        profiler.export_chrome_trace(str(path))
        logger.info("Saved trace %s in %.2f seconds", path, time.perf_counter() - start)
        try:
            logger.info("Where the time of that step went: %s", write_summary(path))
        except (OSError, ValueError) as error:  # a missing summary must not end the run
            logger.warning("%s: could not write its summary: %s", path, error)

    # Each trace is saved at the end of its cycle, so nothing is lost.
    warnings.filterwarnings("ignore", ".*Profiler clears events at the end of each cycle")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    logger.info("Profiling active. Traces will be saved at %s", folder)
    with torch.profiler.profile(
        activities=activities, schedule=_trace_schedule(settings.profile_freq), on_trace_ready=save
    ) as profiler:
        yield profiler.step


@contextmanager
def _memory_snapshots(settings: Profiling, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Record CUDA's allocator history in `<folder>/iteration_<step>/rank<rank>_memory_snapshot.pickle`."""
    logger.info("Memory snapshots active. They will be saved at %s", folder)
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    step = 0

    def record() -> None:
        nonlocal step
        step += 1
        if step % settings.profile_freq == 0:
            path = folder / f"iteration_{step}" / f"rank{rank}_memory_snapshot.pickle"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                pickle.dump(torch.cuda.memory._snapshot(), file)

    try:
        yield record
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def profiling(settings: Profiling, dump_folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Profile according to `settings`; call the yielded function at the end of every step."""
    with ExitStack() as stack:
        end_of_step = []
        if settings.enable_memory_snapshot:
            folder = dump_folder / settings.save_memory_snapshot_folder
            end_of_step.append(stack.enter_context(_memory_snapshots(settings, folder, rank)))
        if settings.enable_profiling:
            folder = dump_folder / settings.save_traces_folder
            end_of_step.append(stack.enter_context(_traces(settings, folder, rank)))

        def step() -> None:
            for end in end_of_step:
                end()

        yield step
