"""The peak of a rank's memory log, and the part of the step in which it occurs."""

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.commands.estimate.layer_extrapolation import ManyLayersLog
from octavo.commands.estimate.memory_tracker import GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, Log
from octavo.commands.estimate.microbatch_extrapolation import ManyMicrobatchesLog

_OUTSIDE = ("start", "end")
_OFFLOADED = (PARAMETERS, GRADIENTS, OPTIMIZER)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of a step. kinds: bytes by use (docs/estimate.md). when: the part of the step. host:
    bytes that CPU offloading keeps on the host.
    """

    kinds: Mapping[str, int]
    when: str
    host: int = 0

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())


def peak_memory(log: Log | ManyMicrobatchesLog | ManyLayersLog, *, offload: bool = False) -> PeakMemory:
    """Return the peak of the step in `log`. `offload`: parameters, gradients and states are on the host."""
    hidden = _OFFLOADED if offload else ()
    parts = [part for part in log.peaks(hidden) if part[0] not in _OUTSIDE]
    when, held = max(parts, key=lambda part: sum(part[1].values()))
    host = 0
    if offload:
        host = max(
            sum(held[kind] for kind in _OFFLOADED) for name, held in log.peaks() if name not in _OUTSIDE
        )
    return PeakMemory({kind: held[kind] for kind in KINDS}, when, host)
