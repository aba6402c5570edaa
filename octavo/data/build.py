"""From what the configuration says of data to a loader; everything about it is refused here, before a model
is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.assets import CORPORA
from octavo.core.errors import ConfigError, did_you_mean
from octavo.data import shard_format
from octavo.data.corpus import PackedCorpus
from octavo.data.corpus_files import find_files
from octavo.data.dataloader import DataLoader
from octavo.data.mixture import Mixture
from octavo.data.prepared import open_prepared
from octavo.data.records import BadRecords
from octavo.data.sample_source import SampleSource
from octavo.data.spec import parse_dataset
from octavo.data.token_cache import tokens_of
from octavo.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a source, whichever it is.

    Attributes:
        dataset_path: for a streamed corpus only, a local copy to read in place of the hub's.
        seq_len: tokens that the model reads of a sample.
        seed: of the order of samples.
        held_out_fraction: share of the samples that is left out, for validation.
        split: of prepared folders.
        bad: counts and passes over bad records of text; None: the first is an error.
        verify: (r, n): compare the checksums of every n-th prepared shard from number r on.
    """

    tokenizer: Tokenizer
    seq_len: int
    seed: int
    dataset_path: str | None = None
    held_out_fraction: float = 0.0
    split: shard_format.Split = shard_format.TRAIN
    bad: BadRecords | None = None
    verify: tuple[int, int] | None = None


def build_source(dataset: str, wanted: Wanted) -> SampleSource:
    """The source that `dataset` names: a corpus, a path, or a mixture of those (`spec.py`).

    Raises:
        ConfigError: something that does not exist, cannot be read or is too small, and what to do.
    """
    if wanted.seq_len < 1:
        raise ConfigError(f"training.seq_len is {wanted.seq_len}; it must be at least 1")
    parts = parse_dataset(dataset, [*CORPORA, *_STREAMED])
    if wanted.dataset_path is not None and not any(name in _STREAMED for name, _ in parts):
        raise ConfigError(
            f"training.dataset_path = {wanted.dataset_path!r} has no effect with training.dataset = "
            f"{dataset!r}; a local folder is named by training.dataset itself, and only "
            f"{', '.join(_STREAMED)} takes a path"
        )
    if len(parts) == 1:
        return _one(parts[0][0], wanted)
    return Mixture([(name, weight, _one(name, wanted)) for name, weight in parts], seed=wanted.seed)


def _one(name: str, wanted: Wanted) -> SampleSource:
    if name in _STREAMED:
        if wanted.held_out_fraction:
            raise ConfigError(
                f"validation.fraction = {wanted.held_out_fraction:g}: {name} is a stream, of which no "
                "share can be held out; name a validation.dataset"
            )
        return _STREAMED[name](wanted)
    root = CORPORA.get(name) or Path(name).expanduser()
    if not root.exists():
        raise ConfigError(
            f"training.dataset = {name!r}: neither a known corpus "
            f"({', '.join([*CORPORA, *_STREAMED])}) nor a file or "
            f"folder{did_you_mean(name, [*CORPORA, *_STREAMED])}"
        )
    if shard_format.is_prepared(root):
        return open_prepared(
            root,
            split=wanted.split,
            tokenizer=wanted.tokenizer,
            seq_len=wanted.seq_len,
            seed=wanted.seed,
            held_out_fraction=wanted.held_out_fraction,
            verify=wanted.verify,
        )
    if wanted.split != shard_format.TRAIN:
        raise ConfigError(
            f"{name} has no {wanted.split} split; name a validation.dataset, or hold a share of the samples "
            "out with validation.fraction"
        )
    return PackedCorpus(
        tokens_of(find_files(root), wanted.tokenizer, wanted.bad),
        name=name,
        vocab_size=wanted.tokenizer.vocab_size,
        seq_len=wanted.seq_len,
        seed=wanted.seed,
        held_out_fraction=wanted.held_out_fraction,
    )


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
    workers: int = 1,
    pin_memory: bool = False,
    held_out_fraction: float = 0.0,
    bad: BadRecords | None = None,
    verify: bool = False,
) -> DataLoader:
    """The loader for `training.dataset`: a shipped corpus by name, local text, a prepared folder, a stream.

    Args:
        dp_rank, dp_degree: this rank's number, and how many ranks see different data.
        workers, pin_memory: see `DataLoader`.
        held_out_fraction: share of the samples that is left out, for validation.
        verify: compare the checksums of prepared shards, each of them on one of the ranks.

    For the others see `Wanted`.

    Raises:
        ConfigError: a dataset that does not exist, cannot be read or is too small, and what to do.
    """
    wanted = Wanted(
        tokenizer=tokenizer,
        seq_len=seq_len,
        seed=seed,
        dataset_path=dataset_path,
        held_out_fraction=held_out_fraction,
        bad=bad,
        verify=(dp_rank, dp_degree) if verify else None,
    )
    return DataLoader(
        build_source(dataset, wanted),
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
        workers=workers,
        pin_memory=pin_memory,
    )


def _c4(wanted: Wanted, split: str = "train") -> SampleSource:
    from octavo.data.stream import StreamedCorpus, open_c4

    files = open_c4(wanted.dataset_path, split, wanted.bad)
    name = "c4" if split == "train" else f"c4_{split}"
    return StreamedCorpus(
        files, name=name, tokenizer=wanted.tokenizer, seq_len=wanted.seq_len, seed=wanted.seed
    )


_STREAMED: Mapping[str, Callable[[Wanted], SampleSource]] = {
    "c4": _c4,
    "c4_validation": lambda wanted: _c4(wanted, "validation"),
}
