"""Batches of tokens: which text a step sees is a function of (corpus, seed, step), whatever the processes.

A corpus is one long row of tokens, every document between the ids that open and close one. Sample i is the
window of seq_len + 1 tokens that starts at i * seq_len: the model reads the first seq_len and is asked for
the last seq_len, so each token of an epoch is asked for at most once, and no label is missing at the edge of
a window. Documents are not separated by a mask; attention sees across them.

Samples have a *global* number, 0, 1, 2, … through all epochs. Microbatch k of rank r out of W, with local
batch B, takes the global samples [(k W + r) B, (k W + r + 1) B), so all ranks together take the next W B. A
checkpoint keeps one number, the next global sample, and another number of ranks with the same global batch
goes on with the same batches.

Two kinds of source: `PackedCorpus` (here) holds a local corpus in memory, shuffled by `order.py`;
`StreamedCorpus` (`stream.py`) reads what is too large for that and never ends. A source gives any sample
of the future; the `DataLoader` alone knows the position.
"""

from __future__ import annotations

import queue
import threading
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.assets import CORPORA
from octavo.components.tokenizer import Tokenizer
from octavo.config.errors import ConfigError, did_you_mean
from octavo.data.files import find_files, read_documents
from octavo.data.order import shuffled

_DOCUMENTS_PER_CALL = 256
_READ_AHEAD = 4  # microbatches that a slow source prepares while the model computes


class Source(Protocol):
    """Samples by global number."""

    description: str  # one line for the log
    identity: Mapping[str, int]  # what must be the same for a global number to mean the same sample
    slow: bool  # worth a thread that reads ahead

    def read(self, first: int, count: int) -> Tensor:
        """Samples [first, first + count) as int64 [count, seq_len + 1]. `first` never falls between calls."""

    def state_dict(self) -> dict[str, Any]:
        """What makes a restart at the current place cheap; never what decides the content of a sample."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PackedCorpus:
    """A local corpus, tokenised once into memory and shuffled anew in every epoch.

    Args:
        documents: the texts, in an order that is the same everywhere.
        name: the corpus, for messages.

    Raises:
        ConfigError: fewer than seq_len + 1 tokens, so that there is no sample.
    """

    slow = False

    def __init__(
        self, documents: Iterable[str], *, name: str, tokenizer: Tokenizer, seq_len: int, seed: int
    ) -> None:
        row, iterator, count = array("i"), iter(documents), 0
        while texts := list(islice(iterator, _DOCUMENTS_PER_CALL)):
            count += len(texts)
            for ids in tokenizer.encode_batch(texts, bos=tokenizer.bos_id is not None, eos=True):
                row.extend(ids)
        self.samples = (len(row) - 1) // seq_len
        self._seq_len, self._seed = seq_len, seed
        if self.samples < 1:
            raise ConfigError(
                f"{name}: {len(row):,} tokens in {count:,} documents are too few for one sample of "
                f"seq_len {seq_len:,} (it takes {seq_len + 1:,}); give more text or a smaller "
                "training.seq_len"
            )
        self.tokens_N = torch.frombuffer(row, dtype=torch.int32)
        self.identity: Mapping[str, int] = {
            "tokens": len(row),
            "crc32": zlib.crc32(row),
            "seq_len": seq_len,
            "seed": seed,
        }
        self.description = (
            f"{name}: {count:,} documents, {len(row):,} tokens, "
            f"{self.samples:,} samples of {seq_len:,} an epoch"
        )

    def read(self, first: int, count: int) -> Tensor:
        """See `Source.read`."""
        samples = torch.empty(count, self._seq_len + 1, dtype=torch.int64)
        for row in range(count):
            epoch, index = divmod(first + row, self.samples)
            start = shuffled(index, self.samples, seed=self._seed, epoch=epoch) * self._seq_len
            samples[row] = self.tokens_N[start : start + self._seq_len + 1]
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Nothing: any sample is at hand."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class _Prepared:
    """One microbatch, and the state of the loader once it has been handed out."""

    samples: Tensor
    position: int
    source_state: dict[str, Any]


class DataLoader:
    """Endless microbatches of one data-parallel rank.

    Args:
        source: where samples come from.
        local_batch_size: samples in a microbatch of one rank.
        dp_rank, dp_degree: this rank's number, and how many ranks see different data.
    """

    def __init__(self, source: Source, *, local_batch_size: int, dp_rank: int, dp_degree: int) -> None:
        if local_batch_size < 1:
            raise ConfigError(f"training.local_batch_size is {local_batch_size}; it must be at least 1")
        if not 0 <= dp_rank < dp_degree:
            raise ValueError(f"dp_rank {dp_rank} lies outside range({dp_degree})")
        self._source = source
        self._batch, self._rank, self._ranks = local_batch_size, dp_rank, dp_degree
        self._position = 0
        self._source_state: dict[str, Any] = {}
        self._ahead: _ReadAhead | None = None

    @property
    def description(self) -> str:
        """One line on the corpus, for the log."""
        return self._source.description

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next microbatch: tokens and labels, each a contiguous int64 [local_batch_size, seq_len].

        `labels[b, s]` is the token that follows `tokens[b, s]`.
        """
        if self._source.slow and self._ahead is None:
            self._ahead = _ReadAhead(self._prepare(self._position))
            # also at the interpreter's exit, which a thread that waits for the network must not hold up
            weakref.finalize(self, self._ahead.close, timeout=5.0)
        prepared = next(self._ahead) if self._ahead else next(self._prepare(self._position))
        self._position, self._source_state = prepared.position, prepared.source_state
        return prepared.samples[:, :-1].contiguous(), prepared.samples[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON-able data.

        `global_sample`, the next sample over all ranks, decides what comes; `source` holds this rank's
        bookmarks, which make a restart cheap (see `merge_state_dicts`).
        """
        return {
            "global_sample": self._position,
            "identity": dict(self._source.identity),
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
        saved, now = state.get("identity", {}), self._source.identity
        changed = [f"{key} was {saved.get(key)}, is {now[key]}" for key in now if saved.get(key) != now[key]]
        if changed:
            source_state = {}  # bookmarks into other text
        self.close()
        self._source.load_state_dict(source_state)
        self._position, self._source_state = position, dict(source_state)
        return "; ".join(changed) or None

    def close(self) -> None:
        """Stop reading ahead. The loader stays usable and goes on where it was."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
            self._source.load_state_dict(self._source_state)

    def _prepare(self, position: int) -> Iterator[_Prepared]:
        return _microbatches(self._source, position, self._batch, self._rank, self._ranks)


def _microbatches(source: Source, position: int, batch: int, rank: int, ranks: int) -> Iterator[_Prepared]:
    """A plain function: it must hold no reference to the loader, whose end stops the thread that runs it."""
    while True:
        samples = source.read(position + rank * batch, batch)
        position += ranks * batch
        yield _Prepared(samples, position, source.state_dict())


class _ReadAhead:
    """Runs an iterator in a thread, a few items ahead; what it raises is raised where the item is asked "
    "for."""

    def __init__(self, items: Iterator[_Prepared]) -> None:
        self._queue: queue.Queue[_Prepared | BaseException] = queue.Queue(maxsize=_READ_AHEAD)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(items,), name="octavo-data", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[_Prepared]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # handed on to the reader
            self._put(error)

    def _put(self, item: _Prepared | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __next__(self) -> _Prepared:
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def close(self, timeout: float | None = None) -> None:
        """End the thread, and wait for that `timeout` seconds at most (None: as long as it takes)."""
        self._stop.set()
        while not self._queue.empty():  # a thread that waits for room need not wait for its time-out
            self._queue.get_nowait()
        if threading.current_thread() is not self._thread:  # garbage is collected in any thread
            self._thread.join(timeout)


def merge_state_dicts(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state out of those of all ranks, so that another number of ranks finds every bookmark.

    Optional: without it the batches are the same, and a rank that takes over a stream from another skips
    forward in it.
    """
    positions = {state["global_sample"] for state in states}
    if len(positions) != 1:
        raise ValueError(f"the ranks stand at different global samples: {sorted(positions)}")
    merged: dict[str, Any] = {}
    for state in states:
        for stream, bookmark in state["source"].get("streams", {}).items():
            if stream not in merged or bookmark["sample"] > merged[stream]["sample"]:
                merged[stream] = bookmark
    return {**states[0], "source": {"streams": merged} if merged else {}}


def build_dataloader(
    *,
    dataset: str,
    dataset_path: str | None,
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int,
    dp_degree: int,
    seed: int,
) -> DataLoader:
    """The loader for `training.dataset`: a shipped corpus by name, a local file or folder, or `c4`.

    Args:
        dataset_path: for `c4` only, a local copy to stream in place of the hub's.
        seq_len: tokens that the model reads of a sample.
        dp_rank, dp_degree: this rank's number, and how many ranks see different data.
        seed: of the order of samples.

    Raises:
        ConfigError: a dataset that does not exist, cannot be read or is too small, and what to do.
    """
    if seq_len < 1:
        raise ConfigError(f"training.seq_len is {seq_len}; it must be at least 1")
    source: Source
    if dataset in _STREAMED:
        source = _STREAMED[dataset](dataset_path, tokenizer, seq_len, seed)
    else:
        if dataset_path is not None:
            raise ConfigError(
                f"training.dataset_path = {dataset_path!r} has no effect with training.dataset = "
                f"{dataset!r}; a local folder "
                f"is named by training.dataset itself, and only {', '.join(_STREAMED)} takes a path"
            )
        root = CORPORA.get(dataset) or Path(dataset).expanduser()
        if not root.exists():
            raise ConfigError(
                f"training.dataset = {dataset!r}: neither a known corpus "
                f"({', '.join([*CORPORA, *_STREAMED])}) nor a file or "
                f"folder{did_you_mean(dataset, [*CORPORA, *_STREAMED])}"
            )
        documents = (document for path in find_files(root) for document in read_documents(path))
        source = PackedCorpus(documents, name=dataset, tokenizer=tokenizer, seq_len=seq_len, seed=seed)
    return DataLoader(source, local_batch_size=local_batch_size, dp_rank=dp_rank, dp_degree=dp_degree)


def _c4(dataset_path: str | None, tokenizer: Tokenizer, seq_len: int, seed: int) -> Source:
    from octavo.data.stream import StreamedCorpus, open_c4

    files = open_c4(dataset_path)
    return StreamedCorpus(files, name="c4", tokenizer=tokenizer, seq_len=seq_len, seed=seed)


_STREAMED: Mapping[str, Callable[[str | None, Tokenizer, int, int], Source]] = {"c4": _c4}
