"""What a loader needs of a corpus: any sample of the future, by its global number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class SampleSource(Protocol):
    """Samples by global number."""

    @property
    def description(self) -> str:
        """One line for the log."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What must be the same for a global number to mean the same sample; JSON-able."""

    @property
    def forward_only(self) -> bool:
        """Whether `first` may not fall from one `read` to the next, so that one thread has to read."""

    def read(self, first: int, count: int) -> Tensor:
        """Samples [first, first + count) as int64 [count, seq_len + 1]."""

    def state_dict(self) -> dict[str, Any]:
        """What makes a restart at the current place cheap; never what decides the content of a sample."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
