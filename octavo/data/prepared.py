"""A prepared folder as a source of samples: shards mapped into memory, read where a sample lies.

Nothing is copied but the sample itself, so a corpus far larger than memory costs what its index costs, and
processes on one machine share the page cache. Before the first sample the folder is checked: the index, the
sizes of all shards, the vocabulary; checksums where asked for, since that reads everything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.corpus import RowCorpus
from octavo.data.shard_format import Index, Shard, Vocabulary
from octavo.tokenizer import Tokenizer


class _Mapped:
    """The ids of several shards as one row."""

    def __init__(self, folder: Path, parts: Sequence[Shard], dtype: str) -> None:
        self._folder, self._parts = folder, [part for part in parts if part.tokens]
        self._starts = [0, *accumulate(part.tokens for part in self._parts)]
        self._maps = [
            np.memmap(folder / part.ids.name, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
            for part in self._parts
        ]
        self.length = self._starts[-1]

    def copy(self, start: int, out_N: NDArray[np.int64]) -> None:
        number, done = bisect_right(self._starts, start) - 1, 0
        while done < len(out_N):
            begin = start + done - self._starts[number]
            piece = self._maps[number][begin : begin + len(out_N) - done]
            out_N[done : done + len(piece)] = piece
            done += len(piece)
            number += 1

    def locate(self, token: int) -> str:
        number = bisect_right(self._starts, token) - 1
        name = self._parts[number].ids.name
        return f"{self._folder / name}, token {token - self._starts[number]:,}"


def open_prepared(
    folder: Path,
    *,
    split: shard_format.Split,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int,
    held_out_fraction: float = 0.0,
    verify: tuple[int, int] | None = None,
) -> RowCorpus:
    """The samples of one split of a prepared folder.

    Args:
        verify: (r, n): also compare the checksums of every n-th shard from number r on; None: of none.

    Raises:
        ConfigError: the index is damaged, a shard is missing or of another size or content, the ids are
            another tokenizer's, or there are too few for one sample.
    """
    index = shard_format.read_index(folder)
    _check_vocabulary(folder, index.vocabulary, tokenizer)
    shard_format.check_sizes(folder, index)
    if verify is not None:
        shard_format.check_sums(folder, index.shards[verify[0] :: verify[1]])
    return _corpus(folder, index, split, tokenizer.vocab_size, seq_len, seed, held_out_fraction)


def _corpus(
    folder: Path,
    index: Index,
    split: shard_format.Split,
    vocab_size: int,
    seq_len: int,
    seed: int,
    held_out_fraction: float,
) -> RowCorpus:
    if split not in index.splits:
        raise ConfigError(
            f"{folder}: has no {split} split; prepare it with --val-fraction, or name another dataset"
        )
    return RowCorpus(
        _Mapped(folder, index.splits[split], index.dtype),
        name=f"{folder} ({split})" if split != shard_format.TRAIN else str(folder),
        documents=index.documents(split),
        identity={"tokens": index.tokens(split), "sha256": index.digest(split)},
        seq_len=seq_len,
        seed=seed,
        vocab_size=vocab_size,
        held_out_fraction=held_out_fraction,
    )


def _check_vocabulary(folder: Path, prepared: Vocabulary, tokenizer: Tokenizer) -> None:
    if prepared.sha256 == tokenizer.fingerprint:
        return
    raise ConfigError(
        f"{folder}: prepared with the tokenizer {prepared.source} of {prepared.size:,} tokens "
        f"({prepared.sha256[:12]}), but model.hf_assets_path is {tokenizer.source} of "
        f"{tokenizer.vocab_size:,} ({tokenizer.fingerprint[:12]}): the same ids would mean other text; set "
        "model.hf_assets_path to the tokenizer it was prepared with, or prepare the data again"
    )
