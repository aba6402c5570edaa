"""Batches of tokens as a function of (corpus, seed, step), independent of the number of processes.

A corpus is one long sequence of tokens, with a begin and an end id around every document. Sample i is the
window of seq_len + 1 tokens that starts at i * seq_len: the first seq_len are the input, the last seq_len the
labels. So each token of an epoch is a label at most once, and no label is missing at the edge of a window.
Whether attention crosses the documents of a window is up to the model (`training.document_mask`).

Samples have a *global* number, 0, 1, 2, … through all epochs. Microbatch k of rank r out of W, with local
batch B, takes the global samples [(k W + r) B, (k W + r + 1) B), so all ranks together take the next W B. A
checkpoint saves one number, the next global sample; a run with another number of ranks and the same global
batch resumes with the same batches.

A source (`sample_source.py`) reads samples by number: a corpus in memory (`corpus.py`), prepared shards
(`prepared.py`), a streamed dataset (`stream.py`), or a mixture of those (`mixture.py`). Only the `DataLoader`
has the position; `prefetch.py` prepares batches ahead of time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.data.labels import split_samples
from octavo.data.prefetch import Microbatch, Prefetcher
from octavo.data.sample_source import SampleSource


class DataLoader:
    """Endless microbatches of one data-parallel rank.

    Args:
        local_batch_size: samples in a microbatch of one rank.
        dp_rank, dp_degree: this rank's number, and how many ranks read different data.
        workers: threads that prefetch microbatches; 0: none. Batches do not depend on it.
        pin_memory: return tensors in page-locked memory, which a GPU copies asynchronously.
        document_end: labels that follow this id are left out of the loss (`labels.py`).
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        local_batch_size: int,
        dp_rank: int,
        dp_degree: int,
        workers: int = 1,
        pin_memory: bool = False,
        document_end: int | None = None,
    ) -> None:
        if local_batch_size < 1:
            raise ConfigError(f"training.local_batch_size is {local_batch_size}; it must be at least 1")
        if not 0 <= dp_rank < dp_degree:
            raise ValueError(f"dp_rank {dp_rank} is outside range({dp_degree})")
        self.source = source
        self._batch, self._rank, self._ranks = local_batch_size, dp_rank, dp_degree
        self._workers, self._pin = min(workers, 1) if source.forward_only else workers, pin_memory
        self._document_end = document_end
        self._position = 0
        self._source_state: dict[str, Any] = {}
        self._prefetcher: Prefetcher | None = None

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next microbatch: tokens and labels, each a contiguous int64 [local_batch_size, seq_len]."""
        if self._prefetcher is not None and self._prefetcher.in_forked_child:
            self._prefetcher = None
            self.source.load_state_dict(self._source_state)
        if self._workers and self._prefetcher is None:
            self._prefetcher = Prefetcher([self._microbatches(number) for number in range(self._workers)])
            # Also runs at the interpreter's exit, which a thread waiting for the network must not delay.
            weakref.finalize(self, self._prefetcher.close, timeout=5.0)
        batch = next(self._prefetcher or self._microbatches(0))
        self._position, self._source_state = batch.position, batch.source_state
        return batch.tokens_BS, batch.labels_BS

    def skip(self, samples: int) -> None:
        """Skip the next `samples` global samples, as if all ranks together had read them."""
        if samples < 0:
            raise ValueError(f"cannot skip {samples} samples; load_state_dict can go back")
        self.close()
        self._position += samples

    def state_dict(self) -> dict[str, Any]:
        """The position after the last returned batch, prefetched ones excluded; JSON-able.

        `global_sample`, the next sample over all ranks, determines the next batches; `source` has this rank's
        bookmarks, which make a restart fast (see `merge_state_dicts`).
        """
        return {
            "global_sample": self._position,
            "identity": dict(self.source.identity),
            "source": self._source_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> str | None:
        """Resume from `state`, saved by any rank of a run with any number of ranks.

        Returns:
            None if the next batches are those of the saved run; else what differs: the corpus, the seed or
            seq_len. The position is set either way.

        Raises:
            ConfigError: `state` is not a loader's state.
        """
        position, source_state = state.get("global_sample"), state.get("source", {})
        if not isinstance(position, int) or position < 0 or not isinstance(source_state, Mapping):
            raise ConfigError(
                f"data state {dict(state)!r:.200} has no valid global_sample; expected an integer, 0 or more"
            )
        saved, now = state.get("identity", {}), self.source.identity
        changed = [
            f"{key} was {saved.get(key)}, is {now.get(key)}"
            for key in dict.fromkeys([*now, *saved])
            if saved.get(key) != now.get(key)
        ]
        if changed:
            source_state = {}  # bookmarks into other text
        self.close()
        self.source.load_state_dict(source_state)
        self._position, self._source_state = position, dict(source_state)
        return "; ".join(changed) or None

    def close(self) -> None:
        """Stop prefetching. The loader can still be used and resumes at its position."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
            self.source.load_state_dict(self._source_state)

    def _microbatches(self, worker: int) -> Iterator[Microbatch]:
        """This worker's microbatches, from the current position."""
        stride = self._ranks * self._batch
        first = self._position + worker * stride
        every = max(1, self._workers) * stride
        split = partial(split_samples, document_end=self._document_end)
        return _microbatches(self.source, first, every, stride, self._rank, self._batch, split, pin=self._pin)


def _microbatches(
    source: SampleSource,
    position: int,
    every: int,
    stride: int,
    rank: int,
    batch: int,
    split: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    pin: bool,
) -> Iterator[Microbatch]:
    # Not a method: a reference to the loader would keep it alive, and so the thread that runs this.
    while True:
        pair = split(source.read(position + rank * batch, batch))
        tokens_BS, labels_BS = (tensor.pin_memory() for tensor in pair) if pin else pair
        yield Microbatch(tokens_BS, labels_BS, position + stride, source.state_dict())
        position += every


def merge_state_dicts(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all ranks, so that a run with another number of ranks finds every bookmark.

    A single rank's state gives the same batches, but a rank without a stream's bookmark has to read it from
    its start.
    """
    positions = {state["global_sample"] for state in states}
    if len(positions) != 1:
        raise ValueError(f"the ranks are at different global samples: {sorted(positions)}")
    return {**states[0], "source": _merge_sources([state["source"] for state in states])}


def _merge_sources(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The furthest bookmark of each stream; for a mixture, source by source."""
    if any("mixture" in state for state in states):
        parts = [state["mixture"] for state in states if "mixture" in state]
        return {"mixture": [_merge_sources(part) for part in zip(*parts, strict=True)]}
    merged: dict[str, Any] = {}
    for state in states:
        for stream, bookmark in state.get("streams", {}).items():
            if stream not in merged or bookmark["sample"] > merged[stream]["sample"]:
                merged[stream] = bookmark
    return {"streams": merged} if merged else {}
