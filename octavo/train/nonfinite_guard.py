"""Decides how to handle steps with a non-finite or spiking loss, before the optimizer changes a parameter.

Every process calls `judge` with the same global loss and gradient norm, and so takes the same decision
without communication. If either number is not finite, the policy `fault_tolerance.non_finite` applies; if the
loss is finite but far above the losses before it, `fault_tolerance.spike`.

    stop     end the run with exit code 4; parameters keep their values from before the step
    skip     update nothing; the step counter, the schedule and the data advance
    rewind   load the last checkpoint and continue with the data after the bad step
    warn     (spikes) log a warning and update normally

Skips and rewinds are for isolated faults. Both have a limit, beyond which the run stops.
"""

import math
from typing import Any

from octavo.config.schema import FaultTolerance
from octavo.core.logging import logger
from octavo.train.hooks import GuardAction, Hook, StepRecord, StepVerdict
from octavo.train.loss_spikes import LASTING, SpikeDetector


class BadNumbers(Exception):
    """Stops the run because of non-finite numbers or a spike; parameters are those before the bad step."""


class Guard(Hook):
    """Judges each step and counts the actions taken.

    skipped: the steps that were skipped. spikes, rewinds: their number since the run began.
    """

    def __init__(self, settings: FaultTolerance):
        self._settings = settings
        self._detector = SpikeDetector(settings.spike_window, settings.spike_threshold)
        self._skipped_in_a_row = 0
        self._rewound_here = 0  # rewinds since the last new checkpoint
        self._saved: int | None = None
        self.skipped: list[int] = []
        self.spikes = 0
        self.rewinds = 0

    def before_update(self, record: StepRecord) -> None:
        record.verdict = self.judge(record.step, record.loss, record.grad_norm)

    def judge(self, step: int, loss: float, grad_norm: float) -> StepVerdict:
        """Decide what to do with `step`, given its global loss and gradient norm, before its update."""
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
            logger.warning("Step %d is skipped without an update: %s", step, reason)
        return StepVerdict(GuardAction(policy), reason, non_finite)

    def _exhausted(self, policy: str) -> str | None:
        """The limit that `policy` has reached, as a clause for a message; None below it."""
        skips, rewinds = self._settings.max_skips, self._settings.max_rewinds
        if policy == "skip" and self._skipped_in_a_row >= skips:
            return f"the {skips} steps before were skipped too (fault_tolerance.max_skips)"
        if policy == "rewind" and self._rewound_here >= rewinds:
            return f"the last checkpoint was already loaded {rewinds} times (fault_tolerance.max_rewinds)"
        return None

    def _warn(self, step: int, reason: str) -> None:
        logger.warning("Step %d: %s", step, reason)
        if self._detector.lasting:
            logger.warning(
                "%d spikes in a row: the loss has a new level, so its statistics are reset", LASTING
            )
            self._detector.restart()

    def saved(self, step: int | None) -> None:
        """Note the last saved step. A new checkpoint resets the count of rewinds to the last one."""
        if step != self._saved:
            self._saved, self._rewound_here = step, 0

    def rewound(self, state: dict[str, Any]) -> None:
        """Restore the statistics from the `state` of an earlier checkpoint, but keep all counts."""
        self._detector.load_state_dict(state["detector"])
        self._skipped_in_a_row = 0
        self._rewound_here += 1
        self.rewinds += 1

    def counts(self) -> dict[str, int]:
        """The counts, as fields of `StepReport`."""
        return {"skipped_steps": len(self.skipped), "spikes": self.spikes, "rewinds": self.rewinds}

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs; serializable as JSON, the same on every process."""
        return {
            "detector": self._detector.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
            "skipped": self.skipped,
            "spikes": self.spikes,
            "rewinds": self.rewinds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._detector.load_state_dict(state["detector"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.skipped = list(state["skipped"])
        self.spikes, self.rewinds = state["spikes"], state["rewinds"]
