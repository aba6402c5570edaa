"""Detects loss spikes by robust statistics over recent losses.

A loss falls fast at first, then slowly, with noise that is not normal. So the center is the median of the
recent losses, and the deviation is 1.4826 times the median absolute deviation, which for normal noise is the
standard deviation (Rousseeuw and Croux, 1993); outliers distort them only if they fill half of the window.
Only losses above the median can be spikes. The median lags behind a falling loss, which errs on the safe
side.

Spikes do not enter the statistics. After `LASTING` spikes in a row, the loss has reached a new level (another
data mixture, for example), and the caller restarts the statistics.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

LEAST = 20
"""Losses needed before any is judged, or the window size if that is smaller."""

LASTING = 20
"""Number of consecutive spikes that count as a new level."""

_SMALLEST = 0.005  # smallest deviation, relative to the median


@dataclass(frozen=True)
class Spike:
    """A spike: the loss, the median and deviation of the last `of` losses, and its height in deviations."""

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
        """The `Spike` if the finite `loss` is one, else None. Counts consecutive spikes."""
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
        """Whether there were `LASTING` spikes in a row, which is a new level."""
        return self._in_a_row >= LASTING

    def restart(self) -> None:
        """Forget all losses."""
        self._losses.clear()
        self._in_a_row = 0

    def absorb(self, loss: float) -> None:
        """Add a loss that is not a spike to the statistics; a non-finite loss is ignored."""
        if math.isfinite(loss):
            self._losses.append(loss)
            self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """The state, serializable as JSON."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`; a shorter window keeps the newest losses."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._in_a_row = state["in_a_row"]
