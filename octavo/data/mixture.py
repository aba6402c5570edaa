"""Several corpora in fixed shares: which of them global sample i comes from, and which of its samples it is.

    training.dataset = "books:0.7,web:0.3"

Global samples come in blocks of 10,000. In each block source k has exactly its share of the slots, shares
being rounded to whole slots; which slots is drawn anew for each block, by (seed, block). So the proportions
hold exactly over every block and nearly over any stretch, and the number of samples that source k has given
before a slot is a product and a count within one block: any sample is found without a walk through those
before it, and no rank or restart can come to another answer.

Each source shuffles its own epochs with the run's seed, and goes through all of its samples before any comes
again, whatever the shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.data.corpus import RowCorpus
from octavo.data.order import shuffled_range
from octavo.data.sample_source import SampleSource

BLOCK = 10_000


class Mixture:
    """Samples of several sources; see `source.SampleSource`.

    Args:
        parts: name, weight and source of each; weights need not add up to 1.

    Raises:
        ConfigError: a share too small for one sample in 10,000.
    """

    def __init__(self, parts: Sequence[tuple[str, float, SampleSource]], *, seed: int) -> None:
        self._parts = parts
        self._sources = [source for _, _, source in parts]
        self._seed = seed
        self.forward_only = any(source.forward_only for source in self._sources)
        self._slots = apportion([(name, weight) for name, weight, _ in parts])
        self._owner_of_place = np.repeat(np.arange(len(parts)), self._slots)
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        shares = ", ".join(
            f"{slots / BLOCK:.2%} {source.description}"
            for slots, source in zip(self._slots, self._sources, strict=True)
        )
        self.description = f"a mixture of {len(parts)}: {shares}"
        self.identity: Mapping[str, Any] = {
            f"{number}.{key}": value
            for number, source in enumerate(self._sources)
            for key, value in {**source.identity, "slots": self._slots[number]}.items()
        }

    def held_out(self, *, seed: int) -> Mixture:
        """What the sources leave out, in the same shares; see `RowCorpus.held_out`."""
        parts = [(name, weight, held_out(source, seed=seed)) for name, weight, source in self._parts]
        return Mixture(parts, seed=seed)

    def where(self, sample: int) -> tuple[int, int]:
        """Which source global sample `sample` is of, and its number among that source's samples."""
        number, slot = divmod(sample, BLOCK)
        block = self._block  # replaced as a whole, for several threads may read
        if block is None or block[0] != number:
            block = self._block = (number, *self._draw(number))
        owner = int(block[1][slot])
        return owner, number * self._slots[owner] + int(block[2][slot])

    def _draw(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The owner of each slot of a block, and how many slots of the block that owner has before it."""
        owners = self._owner_of_place[shuffled_range(0, BLOCK, BLOCK, seed=~self._seed, epoch=block)]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for owner, slots in enumerate(self._slots):
            ranks[owners == owner] = np.arange(slots)
        return owners, ranks

    def read(self, first: int, count: int) -> Tensor:
        """See `SampleSource.read`."""
        places = [self.where(first + row) for row in range(count)]
        return torch.cat([self._sources[owner].read(number, 1) for owner, number in places])

    def state_dict(self) -> dict[str, Any]:
        """The states of the sources."""
        return {"mixture": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each source its state."""
        states = state.get("mixture") or [{}] * len(self._sources)
        for source, part in zip(self._sources, states, strict=True):
            source.load_state_dict(part)


def held_out(source: SampleSource, *, seed: int) -> SampleSource:
    """The samples that a corpus or a mixture leaves out for validation.

    Raises:
        ConfigError: it is a stream, or leaves none out.
    """
    if not isinstance(source, RowCorpus | Mixture):
        raise ConfigError(f"{source.description}: no share of a stream can be held out")
    return source.held_out(seed=seed)


def apportion(weights: Sequence[tuple[str, float]]) -> list[int]:
    """Slots of `BLOCK` for each (name, weight), by largest remainder."""
    total = sum(weight for _, weight in weights)
    exact = [weight / total * BLOCK for _, weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(slots)), key=lambda k: (slots[k] - exact[k], k))
    for k in by_remainder[: BLOCK - sum(slots)]:
        slots[k] += 1
    for (name, weight), count in zip(weights, slots, strict=True):
        if count < 1:
            raise ConfigError(
                f"training.dataset: {name} with weight {weight:g} of {total:g} would give less than one "
                f"sample in {BLOCK:,}; give it more, or leave it out"
            )
    return slots
