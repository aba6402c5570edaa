"""The interface between the data loader and a corpus: random access to samples by global number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class SampleSource(Protocol):
    """Samples by global number 0, 1, 2, … through all epochs."""

    @property
    def description(self) -> str:
        """One line for the log."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Properties that must be equal for a global number to mean the same sample; JSON-able."""

    @property
    def forward_only(self) -> bool:
        """Whether successive reads must not go backwards, so that only one thread may read."""

    def read(self, first: int, count: int) -> Tensor:
        """Samples [first, first + count) as int64 [count, seq_len + 1]."""

    def state_dict(self) -> dict[str, Any]:
        """State that makes a restart at the current position fast; it never affects a sample's content."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
