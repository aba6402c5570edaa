"""Batches of tokens: which text a step sees is a function of (corpus, seed, step), whatever the processes.

A corpus is one long row of tokens, every document between the ids that open and close one. Sample i is the
window of seq_len + 1 tokens that starts at i * seq_len: the model reads the first seq_len and is asked for
the last seq_len, so each token of an epoch is asked for at most once, and no label is missing at the edge of
a window. Whether attention sees across the documents of a window is the model's matter
(`training.document_mask`).

Samples have a *global* number, 0, 1, 2, … through all epochs. Microbatch k of rank r out of W, with local
batch B, takes the global samples [(k W + r) B, (k W + r + 1) B), so all ranks together take the next W B. A
checkpoint keeps one number, the next global sample, and another number of ranks with the same global batch
goes on with the same batches.

A source (`source.py`) gives any sample of the future: a corpus in memory (`corpus.py`), prepared shards
(`prepared.py`), a stream of what is too large to count (`stream.py`), a mixture of those (`mixture.py`). The
`DataLoader` alone knows the position; `prefetch.py` makes batches before they are asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.data.prefetch import Prepared, ReadAhead
from octavo.data.sample_source import SampleSource


class DataLoader:
    """Endless microbatches of one data-parallel rank.

    Args:
        source: where samples come from.
        local_batch_size: samples in a microbatch of one rank.
        dp_rank, dp_degree: this rank's number, and how many ranks see different data.
        workers: threads that make microbatches ahead; 0: they are made when asked for. It changes no batch.
        pin_memory: hand them out in page-locked memory, from which a GPU copies while it computes.
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
    ) -> None:
        if local_batch_size < 1:
            raise ConfigError(f"training.local_batch_size is {local_batch_size}; it must be at least 1")
        if not 0 <= dp_rank < dp_degree:
            raise ValueError(f"dp_rank {dp_rank} lies outside range({dp_degree})")
        self.source = source
        self._batch, self._rank, self._ranks = local_batch_size, dp_rank, dp_degree
        self._workers, self._pin = min(workers, 1) if source.forward_only else workers, pin_memory
        self._position = 0
        self._source_state: dict[str, Any] = {}
        self._ahead: ReadAhead | None = None

    @property
    def description(self) -> str:
        """One line on the corpus, for the log."""
        return self.source.description

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next microbatch: tokens and labels, each a contiguous int64 [local_batch_size, seq_len].

        `labels[b, s]` is the token that follows `tokens[b, s]`.
        """
        if self._ahead is not None and self._ahead.lost:
            self._ahead = None
            self.source.load_state_dict(self._source_state)
        if self._workers and self._ahead is None:
            self._ahead = ReadAhead([self._microbatches(number) for number in range(self._workers)])
            # also at the interpreter's exit, which a thread that waits for the network must not hold up
            weakref.finalize(self, self._ahead.close, timeout=5.0)
        made = next(self._ahead) if self._ahead else next(self._microbatches(0))
        self._position, self._source_state = made.position, made.source_state
        return made.tokens_BS, made.labels_BS

    def skip(self, samples: int) -> None:
        """Pass over the next `samples` global samples, as if all ranks together had seen them."""
        if samples < 0:
            raise ValueError(f"cannot skip {samples} samples; load_state_dict goes back")
        self.close()
        self._position += samples

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON-able data: of what was handed out, not of what is made ahead.

        `global_sample`, the next sample over all ranks, decides what comes; `source` holds this rank's
        bookmarks, which make a restart cheap (see `merge_state_dicts`).
        """
        return {
            "global_sample": self._position,
            "identity": dict(self.source.identity),
            "source": self._source_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> str | None:
        """Go on from `state`, saved by any rank of a run with any number of ranks.

        Returns:
            None where the next batches are those that the saved run would have seen; else why not, in words:
            the corpus, the seed or seq_len is another. The position is taken over all the same.

        Raises:
            ConfigError: `state` is not such a state.
        """
        position, source_state = state.get("global_sample"), state.get("source", {})
        if not isinstance(position, int) or position < 0 or not isinstance(source_state, Mapping):
            raise ConfigError(
                f"data state {dict(state)!r:.200}: expected a global_sample, 0 or more, as octavo writes it"
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
        """Stop reading ahead. The loader stays usable and goes on where it was."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
            self.source.load_state_dict(self._source_state)

    def _microbatches(self, worker: int) -> Iterator[Prepared]:
        """Every microbatch from the position on that is this worker's."""
        stride = self._ranks * self._batch
        first = self._position + worker * stride
        every = max(1, self._workers) * stride
        return _microbatches(self.source, first, every, stride, self._rank, self._batch, pin=self._pin)


def _microbatches(
    source: SampleSource, position: int, every: int, stride: int, rank: int, batch: int, *, pin: bool
) -> Iterator[Prepared]:
    """A plain function: it must hold no reference to the loader, whose end stops the thread that runs it."""
    while True:
        samples = source.read(position + rank * batch, batch)
        pair = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        tokens_BS, labels_BS = (tensor.pin_memory() for tensor in pair) if pin else pair
        yield Prepared(tokens_BS, labels_BS, position + stride, source.state_dict())
        position += every


def merge_state_dicts(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state out of those of all ranks, so that another number of ranks finds every bookmark.

    Optional: without it the batches are the same, and a rank that takes over a stream from another skips
    forward in it.
    """
    positions = {state["global_sample"] for state in states}
    if len(positions) != 1:
        raise ValueError(f"the ranks stand at different global samples: {sorted(positions)}")
    return {**states[0], "source": _merge_sources([state["source"] for state in states])}


def _merge_sources(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The furthest bookmark of each stream; of a mixture, source by source."""
    if any("mixture" in state for state in states):
        parts = [state["mixture"] for state in states if "mixture" in state]
        return {"mixture": [_merge_sources(part) for part in zip(*parts, strict=True)]}
    merged: dict[str, Any] = {}
    for state in states:
        for stream, bookmark in state.get("streams", {}).items():
            if stream not in merged or bookmark["sample"] > merged[stream]["sample"]:
                merged[stream] = bookmark
    return {"streams": merged} if merged else {}
