"""Tokenises records in several processes, in the order of the records.

The main process splits files into records, which is cheap; the workers parse and tokenise batches of them,
each in one thread, and convert ids to bytes. Results come back in the order of the batches, and the number of
batches in flight is limited, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

import numpy as np

from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.corpus_files import BadRecord, parse
from octavo.data.file_formats import Record
from octavo.data.shuffle import mix64
from octavo.tokenizer import Tokenizer, build_tokenizer

_BATCHES_PER_WORKER = 3


Batch = Sequence[tuple[int, Record]]
"""Records, each with the number of its file."""


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one split: concatenated ids as bytes, lengths in ids, and the bytes of their text."""

    data: bytes
    lengths: list[int]
    text_bytes: int


@dataclass(frozen=True)
class EncodedBatch:
    """The result of a batch.

    Attributes:
        last: the number of the last record's file, and that record without content.
        splits: documents by split.
        documents: number of documents by file number.
        bad: (path, number, message) of each record that is not a document.
    """

    last: tuple[int, Record]
    splits: Mapping[str, EncodedDocuments]
    documents: Mapping[int, int]
    bad: list[tuple[str, int, str]]


@dataclass(frozen=True)
class TokenizeJob:
    """Settings of a worker.

    Attributes:
        tokenizer: its name or path.
        dtype: of the ids in the shards.
        key: the text's key in JSON, its column in parquet.
        validation_share: share of the documents in the validation split, drawn by (file, record).
    """

    tokenizer: str
    dtype: str
    key: str
    validation_share: float


class BatchEncoder:
    """Parses and tokenises batches in this process."""

    def __init__(self, job: TokenizeJob, tokenizer: Tokenizer | None = None) -> None:
        self._job = job
        self._tokenizer = tokenizer or build_tokenizer(job.tokenizer)
        self._validation_below = int(job.validation_share * 2**64)

    def encode(self, batch: Batch) -> EncodedBatch:
        texts: dict[str, list[str]] = {shard_format.TRAIN: [], shard_format.VALIDATION: []}
        bad: list[tuple[str, int, str]] = []
        documents = Counter[int]()
        for file, record in batch:
            try:
                text = parse(record, self._job.key)
            except BadRecord as error:
                bad.append((record.path, record.number, str(error)))
                continue
            texts[self._choose_split(file, record.number)].append(text)
            documents[file] += 1
        file, record = batch[-1]
        return EncodedBatch(
            last=(file, record._replace(content=None)),
            splits={split: self._tokenize(group) for split, group in texts.items() if group},
            documents=documents,
            bad=bad,
        )

    def _choose_split(self, file: int, record: int) -> str:
        if not self._validation_below:
            return shard_format.TRAIN
        drawn = mix64(mix64(file) ^ record)
        return shard_format.VALIDATION if drawn < self._validation_below else shard_format.TRAIN

    def _tokenize(self, texts: list[str]) -> EncodedDocuments:
        tokenizer, dtype = self._tokenizer, np.dtype(self._job.dtype).newbyteorder("<")
        encoded = tokenizer.encode_batch(texts, bos=tokenizer.bos_id is not None, eos=True)
        data = b"".join(np.array(ids, dtype=dtype).tobytes() for ids in encoded)
        text_bytes = sum(len(text.encode()) for text in texts)
        return EncodedDocuments(data, [len(ids) for ids in encoded], text_bytes)


_encoder: BatchEncoder | None = None


def _init_worker(job: TokenizeJob) -> None:
    global _encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    _encoder = BatchEncoder(job)


def _exit_with_parent() -> None:
    """Exit when the parent is killed; the worker would otherwise wait forever for its next batch."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: Batch) -> EncodedBatch:
    assert _encoder is not None
    return _encoder.encode(batch)


def encode_batches(
    batches: Iterable[Batch], job: TokenizeJob, *, workers: int, tokenizer: Tokenizer | None = None
) -> Iterator[EncodedBatch]:
    """Encode `batches` in order with `workers` processes; 1 means this process.

    Raises:
        ConfigError: a worker was killed.
    """
    if workers == 1:
        yield from map(BatchEncoder(job, tokenizer).encode, batches)
        return
    pending: deque[Future[EncodedBatch]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _init_worker, (job,)) as pool:
        try:
            for batch in batches:
                pending.append(pool.submit(_encode_in_worker, batch))
                if len(pending) >= workers * _BATCHES_PER_WORKER:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"one of {workers} workers was killed, perhaps for lack of memory: long documents need about "
                "100 times their size; use fewer workers. Rerun the same command to continue"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
