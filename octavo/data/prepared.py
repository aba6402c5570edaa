"""A prepared folder as a source of samples; a shard is mapped into memory when one of its samples is read.

Only the sample itself is copied, so a corpus may be far larger than memory, and processes on one machine
share the page cache. The folder is checked before the first sample: the index, the sizes of all shards and
the vocabulary always, checksums on request, since they read everything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.corpus import PackedCorpus
from octavo.data.sample_source import SourceOptions
from octavo.data.shard_format import Shard, Vocabulary
from octavo.tokenizer import Tokenizer

MOST_MAPPED = 256
"""Shards mapped at a time by all corpora of the process. Each is an open file; many systems allow 1,024."""
_corpus_numbers = count()


@lru_cache(MOST_MAPPED)
def _mapped(corpus: int, path: Path, dtype: str) -> NDArray[Any]:
    """The ids of one shard. The `corpus` number keeps a reopened corpus from reading an old mapping."""
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


class _MappedShards:
    """The ids of several shards as one `TokenSequence`."""

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str) -> None:
        self._folder, self._shards = folder, [shard for shard in shards if shard.tokens]
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._dtype, self._number = dtype, next(_corpus_numbers)
        self.length = self._starts[-1]

    def copy(self, start: int, out_N: NDArray[np.int64]) -> None:
        number, done = bisect_right(self._starts, start) - 1, 0
        while done < len(out_N):
            begin = start + done - self._starts[number]
            mapped = _mapped(self._number, self._folder / self._shards[number].ids.name, self._dtype)
            piece = mapped[begin : begin + len(out_N) - done]
            out_N[done : done + len(piece)] = piece
            done += len(piece)
            number += 1

    def locate(self, token: int) -> str:
        number = bisect_right(self._starts, token) - 1
        return f"{self._folder / self._shards[number].ids.name}, token {token - self._starts[number]:,}"


def open_prepared(folder: Path, options: SourceOptions) -> PackedCorpus:
    """The samples of one split of a prepared folder.

    Raises:
        ConfigError: the index is damaged, a shard is missing or has another size or checksum, the ids are of
            another tokenizer, or there are too few for one sample.
    """
    index = shard_format.read_index(folder)
    _check_vocabulary(folder, index.vocabulary, options.tokenizer)
    shard_format.check_sizes(folder, index)
    if options.verify is not None:
        first, every = options.verify
        shard_format.check_checksums(folder, index.shards[first::every])
    split = options.split
    if split not in index.splits:
        raise ConfigError(
            f"{folder}: has no {split} split; prepare it with --val_fraction, or name another dataset"
        )
    return PackedCorpus(
        _MappedShards(folder, index.splits[split], index.dtype),
        name=f"{folder} ({split})" if split != shard_format.TRAIN else str(folder),
        documents=index.documents(split),
        identity={"tokens": index.tokens(split), "sha256": index.digest(split)},
        options=options,
        bytes_per_token=index.bytes_per_token(split),
    )


def _check_vocabulary(folder: Path, prepared: Vocabulary, tokenizer: Tokenizer) -> None:
    if prepared.sha256 == tokenizer.fingerprint:
        return
    raise ConfigError(
        f"{folder}: prepared with the tokenizer {prepared.source} of {prepared.size:,} tokens "
        f"({prepared.sha256[:12]}), but model.hf_assets_path is {tokenizer.source} of "
        f"{tokenizer.vocab_size:,} ({tokenizer.fingerprint[:12]}), so the ids mean other text; set "
        "model.hf_assets_path to the tokenizer that prepared the data, or prepare the data again"
    )
