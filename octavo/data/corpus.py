"""A packed corpus: one long sequence of tokens, split into windows, reshuffled in every epoch.

Sample i of an epoch is the window of seq_len + 1 tokens that starts at w * seq_len, where w is i's image
under the epoch's permutation (`shuffle.py`). The tokens are in memory (`InMemoryCorpus`) or in the shards of
a prepared folder (`prepared.py`).

A share of the windows can be held out for validation. A separate permutation selects them, independent of the
run's seed and epochs, so every run on this corpus holds out the same text.

Every id is checked against the vocabulary when it is read, because on a GPU an id outside the embedding fails
far from its cause.
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
from octavo.data.sample_source import SourceOptions
from octavo.data.shuffle import permute_many, permute_range
from octavo.tokenizer import Tokenizer

_CHARACTERS_PER_CALL = 2**20  # within a call the tokenizer needs about a hundred bytes per token
_BLOCK = 4096  # samples whose windows are computed at once
_HELD_OUT_SEED = 0x6865_6C64_206F_7574  # never change it: it selects the text that was never trained on


_NO_BLOCK: tuple[int, int, NDArray[np.int64]] = (-1, -1, np.empty(0, dtype=np.int64))


class TokenSequence(Protocol):
    """A long sequence of token ids."""

    @property
    def length(self) -> int: ...

    def copy(self, start: int, out_N: NDArray[np.int64]) -> None:
        """Fill `out_N` with the ids from `start` on."""

    def locate(self, token: int) -> str:
        """File and offset of token number `token`, for error messages."""


class PackedCorpus:
    """A `SampleSource` over a sequence of tokens.

    Args:
        documents: their number, for messages.
        bytes_per_token: of the text, on average, if it is known.
        identity: identifies the text; seq_len, seed and held-out windows are added here.

    Raises:
        ConfigError: too few tokens for one sample, or for one in each part.
    """

    forward_only = False

    def __init__(
        self,
        tokens: TokenSequence,
        *,
        name: str,
        documents: int,
        identity: Mapping[str, Any],
        options: SourceOptions,
        bytes_per_token: float | None = None,
    ) -> None:
        self.bytes_per_token = bytes_per_token
        seq_len, seed = options.seq_len, options.seed
        self._tokens, self._name = tokens, name
        self._seq_len, self._seed, self._vocab_size = seq_len, seed, options.tokenizer.vocab_size
        self._windows = (tokens.length - 1) // seq_len
        self._held_out = math.ceil(self._windows * options.held_out_fraction)
        self._first = self._held_out  # where this part begins in the permuted order of windows
        self.samples = self._windows - self._held_out
        if self.samples < 1:
            needed = "one sample to train on and one to validate on" if self._held_out else "one sample"
            raise ConfigError(
                f"{name}: {tokens.length:,} tokens in {documents:,} documents are too few for {needed} of "
                f"seq_len {seq_len:,} (it takes {seq_len + 1:,}); give more text or a smaller "
                "training.seq_len"
            )
        self.identity: Mapping[str, Any] = {**identity, "seq_len": seq_len, "seed": seed}
        if self._held_out:
            self.identity = {**self.identity, "held_out": self._held_out}
        held_out = f", {self._held_out:,} held out" if self._held_out else ""
        self.description = (
            f"{name}: {documents:,} documents, {tokens.length:,} tokens, "
            f"{self.samples:,} samples of {seq_len:,} per epoch{held_out}"
        )
        self._block = _NO_BLOCK

    def held_out(self, *, seed: int) -> PackedCorpus:
        """The held-out samples, ordered by `seed`; shares the tokens.

        Raises:
            ConfigError: nothing is held out.
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
            self._tokens.copy(self._window(first + row) * self._seq_len, samples_BS[row])
        if samples_BS.max(initial=0) >= self._vocab_size:
            raise self._unknown_id(first, samples_BS)
        return torch.from_numpy(samples_BS)

    def state_dict(self) -> dict[str, Any]:
        return {}  # any sample can be read at once

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def _window(self, sample: int) -> int:
        """The number of the window that is global sample `sample`."""
        epoch, index = divmod(sample, self.samples)
        number, offset = divmod(index, _BLOCK)
        block = self._block  # replaced as a whole, because several threads may read
        if block[:2] != (epoch, number):
            block = self._block = (epoch, number, self._windows_of_block(epoch, number))
        return int(block[2][offset])

    def _windows_of_block(self, epoch: int, number: int) -> NDArray[np.int64]:
        start = number * _BLOCK
        stop = min(start + _BLOCK, self.samples)
        windows_N = permute_range(start, stop, self.samples, seed=self._seed, epoch=epoch)
        if not self._held_out:
            return windows_N
        return permute_many(self._first + windows_N, self._windows, seed=_HELD_OUT_SEED, epoch=0)

    def _unknown_id(self, first: int, samples_BS: NDArray[np.int64]) -> ConfigError:
        row, offset = (int(at) for at in np.argwhere(samples_BS >= self._vocab_size)[0])
        token = self._window(first + row) * self._seq_len + offset
        return ConfigError(
            f"{self._tokens.locate(token)}: the token id {int(samples_BS[row, offset])} is outside the "
            f"vocabulary of {self._vocab_size:,} (sample {first + row}, offset {offset}); prepare the data "
            "again with the tokenizer of model.hf_assets_path"
        )


class _TokenArray:
    """A `TokenSequence` of int32 ids in memory."""

    def __init__(self, ids_N: NDArray[np.int32], name: str) -> None:
        self._ids_N, self._name = ids_N, name
        self.length = len(ids_N)

    def copy(self, start: int, out_N: NDArray[np.int64]) -> None:
        out_N[:] = self._ids_N[start : start + len(out_N)]

    def locate(self, token: int) -> str:
        return f"{self._name}, token {token:,}"


class Tokens(NamedTuple):
    """A tokenised corpus: the concatenated ids of all documents, their number and bytes of text."""

    ids_N: NDArray[np.int32]
    documents: int
    text_bytes: int


def tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """The ids of `documents`, with a begin and an end id around each."""
    ids, count, text_bytes = array("i"), 0, 0
    for texts in _tokenizer_batches(documents):
        count += len(texts)
        text_bytes += sum(len(text.encode()) for text in texts)
        for document in tokenizer.encode_batch(texts, bos=tokenizer.bos_id is not None, eos=True):
            ids.extend(document)
    return Tokens(
        np.frombuffer(ids, dtype=np.int32) if ids else np.empty(0, dtype=np.int32), count, text_bytes
    )


def _tokenizer_batches(documents: Iterable[str]) -> Iterator[list[str]]:
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


class InMemoryCorpus(PackedCorpus):
    """A `PackedCorpus` of tokens in memory; `name` is for messages."""

    def __init__(self, tokens: Tokens, name: str, options: SourceOptions) -> None:
        self.tokens_N = torch.from_numpy(tokens.ids_N)
        super().__init__(
            _TokenArray(tokens.ids_N, name),
            name=name,
            documents=tokens.documents,
            identity={"tokens": len(tokens.ids_N), "crc32": zlib.crc32(tokens.ids_N.data)},
            options=options,
            bytes_per_token=tokens.text_bytes / max(1, len(tokens.ids_N)),
        )
