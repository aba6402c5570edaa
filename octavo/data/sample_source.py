"""The interface of corpora: random access to samples by global number, and the options of every corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from octavo.data import shard_format
from octavo.data.corpus_files import BadRecords
from octavo.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source, whatever dataset it is.

    Attributes:
        seq_len: input tokens per sample.
        seed: of the order of samples.
        dataset_path: for a streamed dataset, a local copy to read instead of the Hugging Face hub.
        held_out_fraction: share of the samples to hold out for validation.
        split: which split of a prepared folder to read.
        bad: skips and counts bad records of text; None: the first one is an error.
        verify: (r, n): verify the checksums of every n-th prepared shard, starting at number r.
    """

    tokenizer: Tokenizer
    seq_len: int
    seed: int
    dataset_path: str | None = None
    held_out_fraction: float = 0.0
    split: shard_format.Split = shard_format.TRAIN
    bad: BadRecords | None = None
    verify: tuple[int, int] | None = None


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
