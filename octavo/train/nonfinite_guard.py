"""What is done about a step with bad numbers, decided before the optimizer touches a parameter.

Every process calls `judge` with the same global loss and gradient norm, and so decides the same without
asking another. A step is *bad* if either is not finite. The policy `fault_tolerance.non_finite` says what
then happens; `fault_tolerance.spike` says it for a loss that is finite but far above those before it.

    stop     the run ends with exit code 4; parameters are as they were before the step
    skip     this step updates nothing; the step counter, the schedule and the data go on
    rewind   the last checkpoint is loaded, and training goes on from it with the data after the bad step
    warn     (spikes) a line in the log; the step updates as any other

Skipping and rewinding mend accidents. What happens again and again is no accident, so both have a limit,
beyond which the run stops.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from octavo.config.schema import FaultTolerance
from octavo.core.logging import logger
from octavo.train.loss_spikes import LASTING, SpikeDetector


class BadNumbers(Exception):
    """The run stops for what its numbers are; parameters are those before the bad step."""


class GuardAction(Enum):
    """What to do with a step whose gradients are there."""

    UPDATE = "update"
    SKIP = "skip"
    REWIND = "rewind"
    STOP = "stop"


@dataclass(frozen=True)
class StepVerdict:
    """reason: what is wrong with the step, empty where nothing is. non_finite: whether it is that."""

    action: GuardAction
    reason: str = ""
    non_finite: bool = False


class Guard:
    """Judges each step, and counts what it did.

    `skipped` are the steps that were skipped, `spikes` and `rewinds` numbers since the run began.
    """

    def __init__(self, settings: FaultTolerance):
        self._settings = settings
        self._detector = SpikeDetector(settings.spike_window, settings.spike_threshold)
        self._skipped_in_a_row = 0
        self._rewound_here = 0  # since a checkpoint was saved last
        self._saved: int | None = None
        self.skipped: list[int] = []
        self.spikes = 0
        self.rewinds = 0

    def judge(self, step: int, loss: float, grad_norm: float) -> StepVerdict:
        """Decide about `step`, given its global loss and gradient norm, before its update."""
        named = {"loss": loss, "gradient norm": grad_norm}
        wrong = [f"the {name} is {value}" for name, value in named.items() if not math.isfinite(value)]
        if wrong:
            return self._act(self._settings.non_finite, step, " and ".join(wrong), non_finite=True)
        spike = None if self._settings.spike == "off" else self._detector.judge(loss)
        if spike is not None:
            self.spikes += 1
            return self._act(self._settings.spike, step, f"{spike} (gradient norm {grad_norm:.4f})")
        self._detector.absorb(loss)
        self._skipped_in_a_row = 0
        return StepVerdict(GuardAction.UPDATE)

    def _act(self, policy: str, step: int, reason: str, *, non_finite: bool = False) -> StepVerdict:
        exhausted = self._exhausted(policy)
        if exhausted is not None:
            return StepVerdict(GuardAction.STOP, f"{reason}, and {exhausted}", non_finite)
        if policy == "warn":
            self._warn(step, reason)
            return StepVerdict(GuardAction.UPDATE, reason)
        if policy == "skip":
            self._skipped_in_a_row += 1
            self.skipped.append(step)
            logger.warning("Step %d is skipped, no parameter is updated: %s", step, reason)
        return StepVerdict(GuardAction(policy), reason, non_finite)

    def _exhausted(self, policy: str) -> str | None:
        """Why `policy` has been followed often enough."""
        skips, rewinds = self._settings.max_skips, self._settings.max_rewinds
        if policy == "skip" and self._skipped_in_a_row >= skips:
            return f"{skips} steps in a row were skipped before (fault_tolerance.max_skips)"
        if policy == "rewind" and self._rewound_here >= rewinds:
            return f"the last checkpoint was gone back to {rewinds} times (fault_tolerance.max_rewinds)"
        return None

    def _warn(self, step: int, reason: str) -> None:
        logger.warning("Step %d: %s", step, reason)
        if self._detector.lasting:
            logger.warning("%d spikes in a row are a new level: its statistics start anew", LASTING)
            self._detector.restart()

    def saved(self, step: int | None) -> None:
        """`step` is what was saved last. A new one means that a rewind gets further than the one before."""
        if step != self._saved:
            self._saved, self._rewound_here = step, 0

    def rewound(self, state: dict[str, Any]) -> None:
        """Training goes on from an earlier checkpoint with this `state`; what was counted stays counted."""
        self._detector.load_state_dict(state["detector"])
        self._skipped_in_a_row = 0
        self._rewound_here += 1
        self.rewinds += 1

    def counts(self) -> dict[str, int]:
        """For the report of a step."""
        return {"skipped_steps": len(self.skipped), "spikes": self.spikes, "rewinds": self.rewinds}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would; JSON-able, the same on every process."""
        return {
            "detector": self._detector.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
            "skipped": self.skipped,
            "spikes": self.spikes,
            "rewinds": self.rewinds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._detector.load_state_dict(state["detector"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.skipped = list(state["skipped"])
        self.spikes, self.rewinds = state["spikes"], state["rewinds"]
