"""Records into ids, by several processes, in the order of the records.

The main process reads files and cuts them into records, which is cheap; the workers parse and tokenise
batches of them, each in one thread, and convert ids into bytes, which in one process would be done by one
core while the others wait. Results come back in the order of the batches, and no more batches are under way
than the workers need, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np

from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.order import mix64
from octavo.data.records import BadRecord, Record, parse
from octavo.tokenizer import Tokenizer, build_tokenizer

_BATCHES_PER_WORKER = 3


@dataclass(frozen=True)
class Batch:
    """Records, each with the number of its file among all."""

    records: tuple[tuple[int, Record], ...]


@dataclass(frozen=True)
class Ids:
    """Documents of one split: their ids as bytes, one after the other, and their lengths in ids."""

    data: bytes
    lengths: list[int]


@dataclass(frozen=True)
class Result:
    """What became of a batch.

    last: its last record, without content, and that one's file. documents: of each file, by its number.
    bad: (path, number, message) of the records that hold no document.
    """

    last: tuple[int, Record]
    splits: Mapping[str, Ids]
    documents: Mapping[int, int]
    bad: list[tuple[str, int, str]]


@dataclass(frozen=True)
class TokenizeJob:
    """What a worker needs to know.

    key: where JSON and parquet have the text. validation_share: of the documents, drawn by (file, record).
    """

    tokenizer: str
    dtype: str
    key: str
    validation_share: float


class Encoder:
    """Does one batch after the other, in this process."""

    def __init__(self, job: TokenizeJob, tokenizer: Tokenizer | None = None) -> None:
        self._job = job
        self._tokenizer = tokenizer or build_tokenizer(job.tokenizer)
        self._validation_below = int(job.validation_share * 2**64)

    def encode(self, batch: Batch) -> Result:
        texts: dict[str, list[str]] = {shard_format.TRAIN: [], shard_format.VALIDATION: []}
        bad: list[tuple[str, int, str]] = []
        documents = Counter[int]()
        for file, record in batch.records:
            try:
                text = parse(record, self._job.key)
            except BadRecord as error:
                bad.append((record.path, record.number, str(error)))
                continue
            texts[self._split(file, record.number)].append(text)
            documents[file] += 1
        file, record = batch.records[-1]
        return Result(
            last=(file, record._replace(content=None)),
            splits={split: self._ids(found) for split, found in texts.items() if found},
            documents=documents,
            bad=bad,
        )

    def _split(self, file: int, record: int) -> str:
        if not self._validation_below:
            return shard_format.TRAIN
        drawn = mix64(mix64(file) ^ record)
        return shard_format.VALIDATION if drawn < self._validation_below else shard_format.TRAIN

    def _ids(self, texts: list[str]) -> Ids:
        tokenizer, dtype = self._tokenizer, np.dtype(self._job.dtype).newbyteorder("<")
        encoded = tokenizer.encode_batch(texts, bos=tokenizer.bos_id is not None, eos=True)
        data = b"".join(np.array(ids, dtype=dtype).tobytes() for ids in encoded)
        return Ids(data, [len(ids) for ids in encoded])


_encoder: Encoder | None = None


def _start(job: TokenizeJob) -> None:
    global _encoder
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    _encoder = Encoder(job)


def _end_with_the_parent() -> None:
    """A worker would wait for ever for the next batch of a process that was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(batch: Batch) -> Result:
    assert _encoder is not None
    return _encoder.encode(batch)


def encode_all(
    batches: Iterable[Batch], job: TokenizeJob, *, workers: int, tokenizer: Tokenizer | None = None
) -> Iterator[Result]:
    """A result for each batch, in order. One worker means this process.

    Raises:
        ConfigError: a worker was killed.
    """
    if workers == 1:
        yield from map(Encoder(job, tokenizer).encode, batches)
        return
    under_way: deque[Future[Any]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,)) as pool:
        try:
            for batch in batches:
                under_way.append(pool.submit(_encode, batch))
                if len(under_way) >= workers * _BATCHES_PER_WORKER:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"a worker of {workers} was killed, perhaps for want of memory: the longest documents need "
                "some 100 times their size; take fewer workers. The same command goes on where this one was"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
