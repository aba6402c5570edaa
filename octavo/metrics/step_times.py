"""How long steps take: percentiles of those that tell of the training, apart from those that do not.

A step is timed from the end of the last one, less the pauses in between (saving, validating): what is left is
waiting for data, computing, and reporting. The first step since the start, and every step in which something
was compiled, say nothing of the others; they are counted apart.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

RECENT = 1000
"""Steps that the percentiles in the metrics cover; those at the end cover all."""


@dataclass(frozen=True)
class Percentiles:
    """Seconds that half, nine in ten, and 99 in a hundred steps took at most."""

    p50: float
    p90: float
    p99: float


def percentiles_of(seconds: Sequence[float]) -> Percentiles | None:
    """By nearest rank, so that each is a time that was measured; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    p50, p90, p99 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 90, 99))
    return Percentiles(p50, p90, p99)


def seconds_compiling() -> float:
    """What torch.compile has taken in this process so far, forward and backward."""
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
        """The first step since the start."""
        self.compiling_steps = 0
        """Steps in which something was compiled, the first one left out."""
        self.compiling = 0.0
        """Seconds that compiling took, in all steps."""
        self._since = self._pause = 0.0
        self._fresh = True

    def start(self, now: float) -> None:
        """Training begins, or goes on, at `now`: what comes next is a first step."""
        self._since, self._pause, self._fresh = now, 0.0, True

    def pause(self, seconds: float) -> None:
        """These seconds are no part of the step."""
        self._pause += seconds

    def end(self, now: float, compiling: float) -> None:
        """A step ended at `now`, in which compiling took that many seconds."""
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
        """Of the last `RECENT` steady steps."""
        return percentiles_of(self.steady[-RECENT:])

    def all(self) -> Percentiles | None:
        """Of all steady steps."""
        return percentiles_of(self.steady)
