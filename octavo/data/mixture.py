"""A mixture of corpora in fixed shares: maps a global sample to a source and a sample of that source.

    training.dataset = "books:0.7,web:0.3"

Global samples come in blocks of 10,000. In each block, source k has exactly its share of the slots, rounded
to whole slots; a permutation by (seed, block) chooses which. So the proportions are exact over every block
and nearly so over any range. The number of samples that source k provided before a slot follows from the
block's number and a count within the block, so any sample is found directly, on every rank and after every
restart.

Each source shuffles its own epochs with the run's seed and provides all of its samples before any repeats,
whatever the shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.data.corpus import PackedCorpus
from octavo.data.sample_source import SampleSource
from octavo.data.shuffle import permute_range

BLOCK = 10_000


class Mixture:
    """A `SampleSource` over several sources.

    Args:
        parts: name, weight and source of each; weights need not add up to 1.

    Raises:
        ConfigError: a share is too small for one sample in 10,000.
    """

    def __init__(self, parts: Sequence[tuple[str, float, SampleSource]], *, seed: int) -> None:
        self._parts = parts
        self._sources = [source for _, _, source in parts]
        self._seed = seed
        self.forward_only = any(source.forward_only for source in self._sources)
        self._slots = allocate_slots([(name, weight) for name, weight, _ in parts])
        self._sorted_owners = np.repeat(np.arange(len(parts)), self._slots)
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        shares = ", ".join(
            f"{slots / BLOCK:.2%} {source.description}"
            for slots, source in zip(self._slots, self._sources, strict=True)
        )
        self.description = f"a mixture of {len(parts)}: {shares}"
        means: list[Any] = [getattr(source, "bytes_per_token", None) for source in self._sources]
        self.bytes_per_token: float | None = None
        """Of the text, on average, if it is known of every source; samples have equal numbers of tokens."""
        if None not in means:
            self.bytes_per_token = float(np.average(means, weights=self._slots))
        self.identity: Mapping[str, Any] = {
            f"{number}.{key}": value
            for number, source in enumerate(self._sources)
            for key, value in {**source.identity, "slots": self._slots[number]}.items()
        }

    def held_out(self, *, seed: int) -> Mixture:
        """A mixture of the sources' held-out samples, in the same shares."""
        parts = [(name, weight, held_out(source, seed=seed)) for name, weight, source in self._parts]
        return Mixture(parts, seed=seed)

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of global sample `sample`, and the sample's number within that source."""
        number, slot = divmod(sample, BLOCK)
        block = self._block  # replaced as a whole, because several threads may read
        if block is None or block[0] != number:
            block = self._block = (number, *self._draw_block(number))
        owner = int(block[1][slot])
        return owner, number * self._slots[owner] + int(block[2][slot])

    def _draw_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each slot of a block: its owner, and how many earlier slots of the block have that owner."""
        owners = self._sorted_owners[permute_range(0, BLOCK, BLOCK, seed=~self._seed, epoch=block)]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for owner, slots in enumerate(self._slots):
            ranks[owners == owner] = np.arange(slots)
        return owners, ranks

    def read(self, first: int, count: int) -> Tensor:
        """See `SampleSource.read`."""
        located = [self.locate(first + row) for row in range(count)]
        return torch.cat([self._sources[owner].read(number, 1) for owner, number in located])

    def state_dict(self) -> dict[str, Any]:
        return {"mixture": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        states = state.get("mixture") or [{}] * len(self._sources)
        for source, part in zip(self._sources, states, strict=True):
            source.load_state_dict(part)


def held_out(source: SampleSource, *, seed: int) -> SampleSource:
    """The samples that a corpus or a mixture holds out for validation.

    Raises:
        ConfigError: the source is streamed, or holds none out.
    """
    if not isinstance(source, PackedCorpus | Mixture):
        raise ConfigError(f"{source.description}: no share of a streamed dataset can be held out")
    return source.held_out(seed=seed)


def allocate_slots(weights: Sequence[tuple[str, float]]) -> list[int]:
    """Divides the slots of a block among (name, weight) parts by the largest-remainder method."""
    total = sum(weight for _, weight in weights)
    exact = [weight / total * BLOCK for _, weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(slots)), key=lambda k: (slots[k] - exact[k], k))
    for k in by_remainder[: BLOCK - sum(slots)]:
        slots[k] += 1
    for (name, weight), count in zip(weights, slots, strict=True):
        if count < 1:
            raise ConfigError(
                f"training.dataset: {name} with weight {weight:g} of {total:g} would have less than one "
                f"sample in {BLOCK:,}; raise its weight, or remove it"
            )
    return slots
