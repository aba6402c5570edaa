"""A dataset too large to download or index: read file by file, with the same samples on any number of ranks.

The dataset is a list of files. They are assigned to V *streams* (64, or the number of files if that is less:
a property of the data, not of the run), in an order that depends on the seed. A stream is endless: its files
one after the other, in another order in every pass; its tokens are packed into windows as in `dataloader.py`.
Global sample i is sample i // V of stream i % V, so a sample's content depends only on the data and the seed,
and a rank reads only the streams of its samples. If V is a multiple of W B, then W ranks of local batch B
share no stream; otherwise several ranks tokenise the same stream, which only costs time.

A *bookmark* is the position of a sample's first token: pass, file, document, token. It is exact, and valid on
every rank. Without one, a stream is read from its start up to the sample.

There is no shuffle buffer, because every checkpoint would have to contain it. Web corpora such as C4 are
published in shuffled order; other corpora must be shuffled beforehand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.core.errors import ConfigError
from octavo.data.corpus_files import TEXT_KEY, BadRecords, find_files, read_documents
from octavo.data.file_formats import FORMAT_OF
from octavo.data.sample_source import SourceOptions
from octavo.data.shuffle import mix64, permute

STREAMS = 64
_DOCUMENTS_PER_CALL = 32
_ROWS_PER_TABLE = 256

OpenFile = Callable[[int], Iterator[str]]
"""Reads one file of a dataset: its non-empty documents in order, from the given number on."""


@dataclass(frozen=True)
class Bookmark:
    """The position where a sample of a stream begins.

    Attributes:
        sample: number of the sample within the stream.
        passes: how often all files of the stream have been read.
        file: index into this pass's order of the stream's files.
        document: number of the document within the file.
        token: number of the token within the document; 0 is its begin id.
    """

    sample: int = 0
    passes: int = 0
    file: int = 0
    document: int = 0
    token: int = 0


class _Stream:
    """One endless sequence of tokens, read sample by sample, forward only."""

    def __init__(
        self,
        files: Sequence[OpenFile],
        name: str,
        options: SourceOptions,
        seed: int,
        start: Bookmark,
    ) -> None:
        self._files, self._name, self._tokenizer = files, name, options.tokenizer
        self._seq_len, self._seed = options.seq_len, seed
        self._documents = self._read(start)
        self._buffer: deque[tuple[Bookmark, list[int]]] = deque()  # starts at the next sample
        self._buffered_tokens = 0
        self.bookmark = start

    def read_sample(self, sample: int) -> list[int]:
        """The seq_len + 1 tokens of `sample`, which must not come before the bookmark."""
        if sample < self.bookmark.sample:
            raise ValueError(f"{self._name}: sample {sample} comes before sample {self.bookmark.sample}")
        while self.bookmark.sample < sample:
            self._next_sample()
        return self._next_sample()

    def _next_sample(self) -> list[int]:
        while self._buffered_tokens <= self._seq_len:
            self._buffer.append(next(self._documents))
            self._buffered_tokens += len(self._buffer[-1][1])
        tokens = list(islice(chain.from_iterable(ids for _, ids in self._buffer), self._seq_len + 1))
        left = self._seq_len
        while len(self._buffer[0][1]) <= left:
            left -= len(self._buffer.popleft()[1])
        place, ids = self._buffer[0]
        self._buffer[0] = (replace(place, token=place.token + left), ids[left:])
        self._buffered_tokens -= self._seq_len
        self.bookmark = replace(self._buffer[0][0], sample=self.bookmark.sample + 1)
        return tokens

    def _read(self, place: Bookmark) -> Iterator[tuple[Bookmark, list[int]]]:
        """Documents from `place` on: the position of each, and its ids from there on."""
        bos = self._tokenizer.bos_id is not None
        while True:
            found = False
            for file in range(place.file, len(self._files)):
                if file != place.file:
                    place = Bookmark(passes=place.passes, file=file)
                index = permute(file, len(self._files), seed=self._seed, epoch=place.passes)
                documents = self._files[index](place.document)
                while texts := list(islice(documents, _DOCUMENTS_PER_CALL)):
                    found = True
                    for ids in self._tokenizer.encode_batch(texts, bos=bos, eos=True):
                        yield place, ids[place.token :]
                        place = replace(place, document=place.document + 1, token=0)
            if not found:
                raise ConfigError(
                    f"{self._name}: the {len(self._files)} files of a stream have no document "
                    f"from {place} on; the data is empty, or has changed since the checkpoint was written"
                )
            place = Bookmark(passes=place.passes + 1)


class StreamedCorpus:
    """A `SampleSource` over a dataset that is read file by file.

    Args:
        files: opens each file, in an order that is the same on every rank.
        name: of the dataset, for messages.
    """

    forward_only = True

    def __init__(self, files: Sequence[OpenFile], name: str, options: SourceOptions) -> None:
        seq_len, seed = options.seq_len, options.seed
        if not files:
            raise ConfigError(f"{name}: no files to read")
        self._count = min(STREAMS, len(files))
        self._files = [files[permute(index, len(files), seed=seed, epoch=0)] for index in range(len(files))]
        self._name, self._options = name, options
        self._streams: dict[int, _Stream] = {}
        self._bookmarks: dict[int, Bookmark] = {}
        self.description = f"{name}: {len(files):,} files in {self._count} streams, samples of {seq_len:,}"
        self.identity: Mapping[str, int] = {"files": len(files), "seq_len": seq_len, "seed": seed}

    def read(self, first: int, count: int) -> Tensor:
        """See `SampleSource.read`."""
        samples = torch.empty(count, self._options.seq_len + 1, dtype=torch.int64)
        for row in range(count):
            sample, number = divmod(first + row, self._count)
            samples[row] = torch.tensor(self._stream(number).read_sample(sample))
        return samples

    def state_dict(self) -> dict[str, Any]:
        """A bookmark for each stream that was read."""
        bookmarks = self._bookmarks | {number: stream.bookmark for number, stream in self._streams.items()}
        return {"streams": {str(number): asdict(bookmark) for number, bookmark in sorted(bookmarks.items())}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the bookmarks; streams without one start from their beginning."""
        self._streams = {}
        self._bookmarks = {
            int(number): Bookmark(**bookmark) for number, bookmark in state.get("streams", {}).items()
        }

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            self._streams[number] = _Stream(
                self._files[number :: self._count],
                self._name,
                self._options,
                seed=mix64(self._options.seed) ^ number,
                start=self._bookmarks.get(number, Bookmark()),
            )
        return self._streams[number]


def open_local_files(root: Path, bad: BadRecords | None = None) -> list[OpenFile]:
    """Openers of the files at or below `root` whose formats hold many documents each."""
    formats = tuple(ending for ending, row in FORMAT_OF.items() if not row.whole)

    def opener(path: Path) -> OpenFile:
        return lambda start: islice(read_documents(path, bad, skip_empty=True), start, None)

    return [opener(path) for path in find_files(root, formats)]


def open_hub_files(repository: str, config: str, split: str = "train") -> list[OpenFile]:
    """Openers of the files of a dataset's split on the Hugging Face hub, streamed by `datasets`.

    Raises:
        ConfigError: `datasets` is missing, or the hub cannot be reached or does not have the dataset.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{repository} is streamed by the package `datasets`: pip install 'octavo[train]'"
        ) from error
    remedy = "check the network and HF_ENDPOINT, or set training.dataset_path to a local copy"
    try:
        dataset = datasets.load_dataset(repository, config, split=split, streaming=True)
        texts_only = dataset.select_columns([TEXT_KEY])
        count: int = texts_only.num_shards
    except Exception as error:  # the libraries raise many types
        kind = type(error).__name__
        raise ConfigError(f"{repository} cannot be opened ({kind}: {error}); {remedy}") from error

    def opener(index: int) -> OpenFile:
        def documents(start: int) -> Iterator[str]:
            rows = texts_only.shard(num_shards=count, index=index).with_format("arrow")
            try:
                for table in rows.iter(batch_size=_ROWS_PER_TABLE):
                    texts = [text for text in table.column(TEXT_KEY).to_pylist() if text]
                    yield from texts[start:]
                    start = max(0, start - len(texts))
            except Exception as error:
                kind = type(error).__name__
                where = f"{repository}, file {index} of {count}"
                raise ConfigError(f"{where}: {kind}: {error}; {remedy}") from error

        return documents

    return [opener(index) for index in range(count)]


def open_c4(dataset_path: str | None, split: str = "train", bad: BadRecords | None = None) -> list[OpenFile]:
    """Openers of a split of English C4: from the hub, or from a local copy of the split's files.

    Raises:
        ConfigError: the copy does not exist or contains no data files; or see `open_hub_files`.
    """
    if dataset_path is None:
        return open_hub_files("allenai/c4", "en", split)
    return open_local_files(Path(dataset_path).expanduser(), bad)
