"""The optimizers that a job may choose, one row each, as data that is read without torch.

To add an optimizer, add a row to `OPTIMIZERS`. The choices of `optimizer.name`, the checks and the memory
that is counted derive from it, and `octavo/optim/optimizer.py` builds it. A class is named as "module:Class",
and called as `Class(parameters, lr=, betas=, eps=, weight_decay=)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer, with at least one of the classes `full` and `low_bit`.

    full: class for float32 weights and moments, run in one of `implementations`.
    implementations: the values of `optimizer.implementation` that `full` supports; it takes `fused=` and
        `foreach=` if these are among them.
    low_bit: class for fewer bits; for all, if there is no `full`. Without it, weights must be float32.
    moments: tensors of state, each as large as the parameter.
    moment_bytes: of each of their elements; None: `optimizer.state_dtype` decides, and `low_bit` takes
        `state_dtype=`.
    why_whole: why it cannot update sharded parameters; None if it can.
    package, source: what it needs, and what pip installs that from.
    """

    name: str
    full: str | None = None
    implementations: tuple[str, ...] = ()
    low_bit: str | None = None
    moments: int = 2
    moment_bytes: int | None = 4
    why_whole: str | None = None
    package: str | None = None
    source: str = ""


_TORCHS = ("for-loop", "foreach", "fused")

OPTIMIZERS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        row.name: row
        for row in (
            OptimizerKind("Adam", "torch.optim:Adam", _TORCHS),
            OptimizerKind(
                "AdamW",
                "torch.optim:AdamW",
                _TORCHS,
                low_bit="octavo.optim.low_bit:AdamW",
                moment_bytes=None,
            ),
            OptimizerKind(
                "AdamW8bit",
                low_bit="octavo.optim.low_bit:AdamW8bit",
                moment_bytes=1,
                why_whole="its blocks of 256 numbers would straddle shards",
                package="bitsandbytes",
                source="'octavo[adam8bit]'",
            ),
        )
    }
)
