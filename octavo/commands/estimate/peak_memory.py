"""From a process's log to its peak, and where in the step it is."""

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.commands.estimate.layer_costs import Grown
from octavo.commands.estimate.memory_tracker import GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, Log
from octavo.commands.estimate.microbatches import Stretched

_OUTSIDE = ("start", "end")
_OFFLOADED = (PARAMETERS, GRADIENTS, OPTIMIZER)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at a step's highest moment. kinds: what they are for, see docs/estimate.md. when: the part of the
    step. host: bytes that offloading keeps on the host.
    """

    kinds: Mapping[str, int]
    when: str
    host: int = 0

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())


def memory_of(log: Log | Stretched | Grown, *, offload: bool = False) -> PeakMemory:
    """The peak of the step in `log`; with `offload`, of what stays on the device."""
    hidden = _OFFLOADED if offload else ()
    parts = [part for part in log.peaks(hidden) if part[0] not in _OUTSIDE]
    when, held = max(parts, key=lambda part: sum(part[1].values()))
    host = 0
    if offload:
        everything = [part[1] for part in log.peaks() if part[0] not in _OUTSIDE]
        host = max(sum(held[kind] for kind in _OFFLOADED) for held in everything)
    return PeakMemory({kind: held[kind] for kind in KINDS}, when, host)
