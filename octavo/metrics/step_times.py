"""Step time percentiles over steady steps.

A step is timed from the end of the previous step, minus pauses (saving, validating), so its time covers
waiting for data, computing and reporting. The first step after the start, and every step in which something
was compiled, are not representative; they are counted separately.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

RECENT = 1000
"""Number of recent steps that the percentiles in the metrics cover; the final summary covers all steps."""


@dataclass(frozen=True)
class Percentiles:
    """50th, 90th and 99th percentile of the step time, in seconds."""

    p50: float
    p90: float
    p99: float


def percentiles_of(seconds: Sequence[float]) -> Percentiles | None:
    """Percentiles by nearest rank, so each is a measured time; None if `seconds` is empty."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    p50, p90, p99 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 90, 99))
    return Percentiles(p50, p90, p99)


def seconds_compiling() -> float:
    """Seconds that torch.compile has taken in this process so far, forward and backward."""
    from torch._dynamo.utils import compilation_time_metrics

    return sum(
        sum(compilation_time_metrics.get(key, ()))
        for key in ("_compile.compile_inner", "backward._backward_impl")
    )


class StepTimes:
    """Collects the times of steps, in seconds."""

    def __init__(self) -> None:
        self.steady = array("d")
        self.first: float | None = None
        """Seconds of the first step after the start."""
        self.compiling_steps = 0
        """Number of steps in which something was compiled, without the first step."""
        self.compiling = 0.0
        """Total seconds of compilation, in all steps."""
        self._since = self._pause = 0.0
        self._fresh = True

    def start(self, now: float) -> None:
        """Training starts or resumes at `now`; the next step is a first step."""
        self._since, self._pause, self._fresh = now, 0.0, True

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` from the current step."""
        self._pause += seconds

    def end(self, now: float, compiling: float) -> None:
        """End a step at `now`, of which `compiling` seconds were compilation."""
        seconds = now - self._since - self._pause
        self._since, self._pause = now, 0.0
        self.compiling += compiling
        if self._fresh:
            self.first, self._fresh = seconds, False
        elif compiling:
            self.compiling_steps += 1
        else:
            self.steady.append(seconds)

    def recent(self) -> Percentiles | None:
        """Percentiles of the last `RECENT` steady steps."""
        return percentiles_of(self.steady[-RECENT:])

    def all(self) -> Percentiles | None:
        """Percentiles of all steady steps."""
        return percentiles_of(self.steady)
