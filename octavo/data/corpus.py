"""A corpus that is all there: one long row of tokens, cut into windows, shuffled anew in every epoch.

Sample i of an epoch is the window of seq_len + 1 tokens that starts at w * seq_len, with w the place of i in
the epoch's order (`order.py`). The row lies in memory (`PackedCorpus`) or in the shards of a prepared folder
(`prepared.py`); what is common to both is here.

A share of the windows can be held out for validation. Which ones is drawn by a permutation of its own, which
knows neither the run's seed nor its epochs: every run on this corpus holds out the same text.

Every id is compared with the vocabulary when it is read, because an id that the embedding has not got is, on
a GPU, an error far away from its cause.
"""

from __future__ import annotations

import copy
import math
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.data.order import shuffled_many, shuffled_range
from octavo.tokenizer import Tokenizer

_CHARACTERS_PER_CALL = 2**20  # the tokenizer takes some hundred bytes a token until a call is done
_BLOCK = 4096  # samples whose place is computed at once
_HELD_OUT_SEED = 0x6865_6C64_206F_7574  # never change it: it says which text was never trained on


_NO_BLOCK: tuple[int, int, NDArray[np.int64]] = (-1, -1, np.empty(0, dtype=np.int64))


class TokenRow(Protocol):
    """A long row of token ids."""

    @property
    def length(self) -> int: ...

    def copy(self, start: int, out_N: NDArray[np.int64]) -> None:
        """Fill `out_N` with the ids from `start` on."""

    def locate(self, token: int) -> str:
        """Where the id number `token` of the row stands, for a message."""


class RowCorpus:
    """Samples of a row of tokens; see `source.SampleSource`.

    Args:
        documents: how many there are, for messages.
        identity: of the text, beside what is added here.
        held_out_fraction: share of the windows that is left to `held_out`.

    Raises:
        ConfigError: too few tokens for one sample, or for one of each part.
    """

    forward_only = False

    def __init__(
        self,
        row: TokenRow,
        *,
        name: str,
        documents: int,
        identity: Mapping[str, Any],
        seq_len: int,
        seed: int,
        vocab_size: int,
        held_out_fraction: float = 0.0,
    ) -> None:
        self._row, self._name = row, name
        self._seq_len, self._seed, self._vocab_size = seq_len, seed, vocab_size
        self._windows = (row.length - 1) // seq_len
        self._held_out = math.ceil(self._windows * held_out_fraction)
        self._first = self._held_out  # of the drawn order of windows: where this part begins
        self.samples = self._windows - self._held_out
        if self.samples < 1:
            wanted = "one sample to train on and one to validate on" if self._held_out else "one sample"
            raise ConfigError(
                f"{name}: {row.length:,} tokens in {documents:,} documents are too few for {wanted} of "
                f"seq_len {seq_len:,} (it takes {seq_len + 1:,}); give more text or a smaller "
                "training.seq_len"
            )
        self.identity: Mapping[str, Any] = {**identity, "seq_len": seq_len, "seed": seed}
        if self._held_out:
            self.identity = {**self.identity, "held_out": self._held_out}
        kept = f", {self._held_out:,} held out" if self._held_out else ""
        self.description = (
            f"{name}: {documents:,} documents, {row.length:,} tokens, "
            f"{self.samples:,} samples of {seq_len:,} an epoch{kept}"
        )
        self._block = _NO_BLOCK

    def held_out(self, *, seed: int) -> RowCorpus:
        """The part that this one leaves out, in an order by `seed`; it shares the row.

        Raises:
            ConfigError: it leaves nothing out.
        """
        if not self._held_out:
            raise ConfigError(f"{self._name}: nothing is held out; set validation.fraction")
        part = copy.copy(self)
        part._first, part.samples, part._seed, part._block = 0, self._held_out, seed, _NO_BLOCK
        part.description = f"{self._name}: {part.samples:,} samples of {self._seq_len:,} held out"
        return part

    def read(self, first: int, count: int) -> Tensor:
        """See `SampleSource.read`."""
        samples_BS = np.empty((count, self._seq_len + 1), dtype=np.int64)
        for row in range(count):
            self._row.copy(self._window(first + row) * self._seq_len, samples_BS[row])
        if samples_BS.max(initial=0) >= self._vocab_size:
            self._refuse(first, samples_BS)
        return torch.from_numpy(samples_BS)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: any sample is at hand."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def _window(self, sample: int) -> int:
        """The window that the global number `sample` means."""
        epoch, index = divmod(sample, self.samples)
        number, place = divmod(index, _BLOCK)
        block = self._block  # replaced as a whole, for several threads may read
        if block[:2] != (epoch, number):
            block = self._block = (epoch, number, self._places(epoch, number))
        return int(block[2][place])

    def _places(self, epoch: int, number: int) -> NDArray[np.int64]:
        start = number * _BLOCK
        stop = min(start + _BLOCK, self.samples)
        places_N = shuffled_range(start, stop, self.samples, seed=self._seed, epoch=epoch)
        if not self._held_out:
            return places_N
        return shuffled_many(self._first + places_N, self._windows, seed=_HELD_OUT_SEED, epoch=0)

    def _refuse(self, first: int, samples_BS: NDArray[np.int64]) -> None:
        row, offset = (int(at) for at in np.argwhere(samples_BS >= self._vocab_size)[0])
        token = self._window(first + row) * self._seq_len + offset
        raise ConfigError(
            f"{self._row.locate(token)}: the token id {int(samples_BS[row, offset])} lies outside the "
            f"vocabulary of {self._vocab_size:,} (sample {first + row}, offset {offset}); prepare the data "
            "again, with the tokenizer of model.hf_assets_path"
        )


class _Memory:
    """A row of int32 ids in memory."""

    def __init__(self, ids_N: NDArray[np.int32], name: str) -> None:
        self._ids_N, self._name = ids_N, name
        self.length = len(ids_N)

    def copy(self, start: int, out_N: NDArray[np.int64]) -> None:
        out_N[:] = self._ids_N[start : start + len(out_N)]

    def locate(self, token: int) -> str:
        return f"{self._name}, token {token:,}"


class Tokens(NamedTuple):
    """A local corpus, tokenised: the ids of all documents one after the other, and how many these are."""

    ids_N: NDArray[np.int32]
    documents: int


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """`documents` as ids, each between the ids that open and close one."""
    row, count = array("i"), 0
    for texts in _calls(documents):
        count += len(texts)
        for ids in tokenizer.encode_batch(texts, bos=tokenizer.bos_id is not None, eos=True):
            row.extend(ids)
    return Tokens(np.frombuffer(row, dtype=np.int32) if row else np.empty(0, dtype=np.int32), count)


def _calls(documents: Iterable[str]) -> Iterator[list[str]]:
    """`documents` in portions for the tokenizer."""
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text) + 1
        if characters >= _CHARACTERS_PER_CALL:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


class PackedCorpus(RowCorpus):
    """A local corpus, tokenised once into memory.

    Args:
        tokens: of its documents, in an order that is the same everywhere.
        name: the corpus, for messages.

    Raises:
        ConfigError: fewer than seq_len + 1 tokens, so that there is no sample.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        name: str,
        vocab_size: int,
        seq_len: int,
        seed: int,
        held_out_fraction: float = 0.0,
    ) -> None:
        self.tokens_N = torch.from_numpy(tokens.ids_N)
        super().__init__(
            _Memory(tokens.ids_N, name),
            name=name,
            documents=tokens.documents,
            identity={"tokens": len(tokens.ids_N), "crc32": zlib.crc32(tokens.ids_N.data)},
            seq_len=seq_len,
            seed=seed,
            vocab_size=vocab_size,
            held_out_fraction=held_out_fraction,
        )
