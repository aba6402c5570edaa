"""Spikes of the loss, by statistics that no spike and no NaN enters.

A loss falls fast at first, then slowly, under noise that is not normal. So the centre is the median of the
last losses and the deviation is 1.4826 times the median distance from it, which for normal noise is the
standard deviation (Rousseeuw and Croux, 1993); half of the window would have to be bad to move them. Only
what lies above is a spike: the median lags behind a falling loss, on the safe side.

What is judged a spike is not taken in. If it lasts, it is no spike but a new level (another mixture of data,
say): after `LASTING` in a row the statistics start anew.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

LEAST = 20
"""Losses to have seen before anything is judged, or the whole window where that is shorter."""

LASTING = 20
"""Spikes in a row that are a new level."""

_SMALLEST = 0.005  # of the median: a flatter loss than this has no deviation worth the name


@dataclass(frozen=True)
class Spike:
    """A loss, the median and deviation of those before it, and how many deviations it lies above."""

    loss: float
    median: float
    deviation: float
    height: float
    of: int

    def __str__(self) -> str:
        return (
            f"the loss {self.loss:.4f} is a spike, {self.height:.1f} deviations of {self.deviation:.4f} "
            f"above the median {self.median:.4f} of the last {self.of} losses"
        )


class SpikeDetector:
    """Judges losses one by one: `judge`, then `absorb` unless it was a spike.

    Args:
        window: losses that the statistics cover.
        threshold: deviations above the median from which a loss is a spike.
    """

    def __init__(self, window: int, threshold: float):
        self._losses: deque[float] = deque(maxlen=window)
        self._threshold = threshold
        self._in_a_row = 0

    def judge(self, loss: float) -> Spike | None:
        """What is wrong with `loss`, a finite number, if it is a spike. Counts it, but takes nothing in."""
        window = self._losses.maxlen or 0
        if len(self._losses) < min(LEAST, window):
            return None
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self._losses)
        deviation = max(deviation, _SMALLEST * abs(median), 1e-12)
        height = (loss - median) / deviation
        if height < self._threshold:
            return None
        self._in_a_row += 1
        return Spike(loss, median, deviation, height, len(self._losses))

    @property
    def lasting(self) -> bool:
        """Whether the last spikes are a new level."""
        return self._in_a_row >= LASTING

    def restart(self) -> None:
        """Forget all losses."""
        self._losses.clear()
        self._in_a_row = 0

    def absorb(self, loss: float) -> None:
        """Take in a loss that is no spike; a non-finite one is ignored."""
        if math.isfinite(loss):
            self._losses.append(loss)
            self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; a shorter window keeps its newest losses."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._in_a_row = state["in_a_row"]
