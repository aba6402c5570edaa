"""A corpus too large to hold or to count: read as it comes, and still the same samples on any number of
ranks.

The data set is a list of files. They are dealt out to V *streams* (64, or the number of files if that is
less: a property of the data, never of the run), in an order that the seed decides. A stream is endless: its
files one after the other, in another order in every pass; its tokens are packed and cut as in `loader.py`.
Global sample i is sample i // V of stream i % V. So what a sample holds depends on data and seed alone, and a
rank reads only the streams in which its samples lie: where V is a multiple of W B, W ranks of local batch B
share no stream; elsewhere a stream is tokenised by more than one rank, which costs time and changes nothing.

A *bookmark* says where a sample's first token lies: pass, file, document, token. It is exact, small, plain
data and good for any rank. A stream that is entered without a bookmark is read from its start up to the
place.

There is no shuffle buffer, for its content would have to be in every checkpoint. Web corpora such as C4 are
shuffled when they are published; one that is not has to be shuffled beforehand.
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
from octavo.data.corpus_files import find_files
from octavo.data.order import mix64, shuffled
from octavo.data.records import TEXT_KEY, BadRecords, read_documents
from octavo.tokenizer import Tokenizer

STREAMS = 64
_DOCUMENTS_PER_CALL = 32
_ROWS_PER_TABLE = 256

OpenFile = Callable[[int], Iterator[str]]
"""Opens one file of a data set: its documents in order, from the given number on, none of them empty."""


@dataclass(frozen=True)
class Bookmark:
    """Where a sample of a stream begins.

    Attributes:
        sample: number of the sample within the stream.
        passes: how often all files of the stream have been read.
        file: place in this pass's order of the stream's files.
        document: number of the document within the file.
        token: number of the token within the document; 0 is the one that opens it.
    """

    sample: int = 0
    passes: int = 0
    file: int = 0
    document: int = 0
    token: int = 0


class _Stream:
    """One endless row of tokens, handed out a sample at a time, forward only."""

    def __init__(
        self,
        files: Sequence[OpenFile],
        *,
        name: str,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        start: Bookmark,
    ) -> None:
        self._files, self._name, self._tokenizer = files, name, tokenizer
        self._seq_len, self._seed = seq_len, seed
        self._documents = self._read(start)
        self._held: deque[tuple[Bookmark, list[int]]] = deque()  # begins where the next sample does
        self._held_tokens = 0
        self.bookmark = start

    def take(self, sample: int) -> list[int]:
        """The seq_len + 1 tokens of `sample`, which must not lie behind the bookmark."""
        if sample < self.bookmark.sample:
            raise ValueError(f"{self._name}: sample {sample} lies behind sample {self.bookmark.sample}")
        while self.bookmark.sample < sample:
            self._next()
        return self._next()

    def _next(self) -> list[int]:
        while self._held_tokens <= self._seq_len:
            self._held.append(next(self._documents))
            self._held_tokens += len(self._held[-1][1])
        tokens = list(islice(chain.from_iterable(ids for _, ids in self._held), self._seq_len + 1))
        left = self._seq_len
        while len(self._held[0][1]) <= left:
            left -= len(self._held.popleft()[1])
        place, ids = self._held[0]
        self._held[0] = (replace(place, token=place.token + left), ids[left:])
        self._held_tokens -= self._seq_len
        self.bookmark = replace(self._held[0][0], sample=self.bookmark.sample + 1)
        return tokens

    def _read(self, place: Bookmark) -> Iterator[tuple[Bookmark, list[int]]]:
        """Documents from `place` on: where each begins, and its ids from that place on."""
        bos = self._tokenizer.bos_id is not None
        while True:
            found = False
            for file in range(place.file, len(self._files)):
                if file != place.file:
                    place = Bookmark(passes=place.passes, file=file)
                documents = self._files[self._order(place)](place.document)
                while texts := list(islice(documents, _DOCUMENTS_PER_CALL)):
                    found = True
                    for ids in self._tokenizer.encode_batch(texts, bos=bos, eos=True):
                        yield place, ids[place.token :]
                        place = replace(place, document=place.document + 1, token=0)
            if not found:
                raise ConfigError(
                    f"{self._name}: the {len(self._files)} files of a stream hold no document "
                    f"from {place} on; the data is empty, or has changed since the checkpoint was written"
                )
            place = Bookmark(passes=place.passes + 1)

    def _order(self, place: Bookmark) -> int:
        return shuffled(place.file, len(self._files), seed=self._seed, epoch=place.passes)


class StreamedCorpus:
    """Samples of a data set that is read file by file. See the module's text and `loader.SampleSource`.

    Args:
        files: what opens each file, in an order that is the same everywhere.
        name: the data set, for messages.
    """

    forward_only = True

    def __init__(
        self, files: Sequence[OpenFile], *, name: str, tokenizer: Tokenizer, seq_len: int, seed: int
    ) -> None:
        if not files:
            raise ConfigError(f"{name}: no files to read")
        self._count = min(STREAMS, len(files))
        self._files = [files[shuffled(index, len(files), seed=seed, epoch=0)] for index in range(len(files))]
        self._name, self._tokenizer, self._seq_len, self._seed = name, tokenizer, seq_len, seed
        self._streams: dict[int, _Stream] = {}
        self._bookmarks: dict[int, Bookmark] = {}
        self.description = f"{name}: {len(files):,} files in {self._count} streams, samples of {seq_len:,}"
        self.identity: Mapping[str, int] = {"files": len(files), "seq_len": seq_len, "seed": seed}

    def read(self, first: int, count: int) -> Tensor:
        """See `SampleSource.read`."""
        samples = torch.empty(count, self._seq_len + 1, dtype=torch.int64)
        for row in range(count):
            sample, number = divmod(first + row, self._count)
            samples[row] = torch.tensor(self._stream(number).take(sample))
        return samples

    def state_dict(self) -> dict[str, Any]:
        """A bookmark for each stream that was read."""
        places = self._bookmarks | {number: stream.bookmark for number, stream in self._streams.items()}
        return {"streams": {str(number): asdict(place) for number, place in sorted(places.items())}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from bookmarks; streams without one start from their beginning."""
        self._streams = {}
        self._bookmarks = {
            int(number): Bookmark(**place) for number, place in state.get("streams", {}).items()
        }

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            self._streams[number] = _Stream(
                self._files[number :: self._count],
                name=self._name,
                tokenizer=self._tokenizer,
                seq_len=self._seq_len,
                seed=mix64(self._seed) ^ number,
                start=self._bookmarks.get(number, Bookmark()),
            )
        return self._streams[number]


def local_files(root: Path, bad: BadRecords | None = None) -> list[OpenFile]:
    """What opens the files of a local copy: `.json`, `.jsonl` (compressed or not) and `.parquet`, at or
    below `root`. Bad records are `bad`'s matter.
    """
    formats = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")

    def opener(path: Path) -> OpenFile:
        return lambda start: islice(read_documents(path, bad, pass_empty=True), start, None)

    return [opener(path) for path in find_files(root, formats)]


def hub_files(repository: str, config: str, split: str = "train") -> list[OpenFile]:
    """What opens the files of a split of a data set on the Hugging Face hub, streamed by `datasets`.

    Raises:
        ConfigError: `datasets` is missing, or the hub cannot be reached or does not know the data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{repository} is streamed by the package `datasets`: pip install 'octavo[train]'"
        ) from error
    remedy = "check the network and HF_ENDPOINT, or name a local copy by training.dataset_path"
    try:
        rows = datasets.load_dataset(repository, config, split=split, streaming=True)
        whole = rows.select_columns([TEXT_KEY])
        count: int = whole.num_shards
    except Exception as error:  # of many kinds, by the libraries below
        kind = type(error).__name__
        raise ConfigError(f"{repository} cannot be opened ({kind}: {error}); {remedy}") from error

    def opener(index: int) -> OpenFile:
        def documents(start: int) -> Iterator[str]:
            rows = whole.shard(num_shards=count, index=index).with_format("arrow")
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
    """A split of the English part of C4: from the hub, or from a local copy of the split's files.

    Raises:
        ConfigError: the copy does not exist or holds no data files; or see `hub_files`.
    """
    if dataset_path is None:
        return hub_files("allenai/c4", "en", split)
    return local_files(Path(dataset_path).expanduser(), bad)
