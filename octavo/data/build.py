"""Builds the source of samples that a dataset option names; all its errors are raised before a model is
built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.assets import CORPORA
from octavo.core.errors import ConfigError, did_you_mean
from octavo.data import shard_format
from octavo.data.corpus import InMemoryCorpus
from octavo.data.corpus_files import BadRecords, find_files
from octavo.data.dataset_spec import parse_dataset
from octavo.data.mixture import Mixture
from octavo.data.prepared import open_prepared
from octavo.data.sample_source import SampleSource
from octavo.data.token_cache import load_or_tokenize
from octavo.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source, whatever dataset it is.

    Attributes:
        seq_len: input tokens per sample.
        seed: of the order of samples.
        dataset_path: for a streamed dataset, a local copy to read instead of the Hugging Face hub.
        held_out_fraction: share of the samples to hold out for validation.
        split: which split of a prepared folder to read.
        bad: skips and counts bad records of text; None: the first one is an error.
        verify: (r, n): verify the checksums of every n-th prepared shard, starting at number r.
    """

    tokenizer: Tokenizer
    seq_len: int
    seed: int
    dataset_path: str | None = None
    held_out_fraction: float = 0.0
    split: shard_format.Split = shard_format.TRAIN
    bad: BadRecords | None = None
    verify: tuple[int, int] | None = None


def build_source(dataset: str, options: SourceOptions) -> SampleSource:
    """The source for `training.dataset`: a shipped corpus by name, local text, a prepared folder, a stream,
    or a mixture of those (`dataset_spec.py`).

    Raises:
        ConfigError: a dataset that does not exist, cannot be read or is too small, with a remedy.
    """
    if options.seq_len < 1:
        raise ConfigError(f"training.seq_len is {options.seq_len}; it must be at least 1")
    parts = parse_dataset(dataset, [*CORPORA, *_STREAMED])
    if options.dataset_path is not None and not any(name in _STREAMED for name, _ in parts):
        raise ConfigError(
            f"training.dataset_path = {options.dataset_path!r} has no effect with training.dataset = "
            f"{dataset!r}; only {', '.join(_STREAMED)} has a local copy. To train on a local folder, name it "
            "in training.dataset"
        )
    if len(parts) == 1:
        return _build_one(parts[0][0], options)
    return Mixture([(name, weight, _build_one(name, options)) for name, weight in parts], seed=options.seed)


def _build_one(name: str, options: SourceOptions) -> SampleSource:
    if name in _STREAMED:
        if options.held_out_fraction:
            raise ConfigError(
                f"validation.fraction = {options.held_out_fraction:g}: {name} is streamed, so no share of it "
                "can be held out; name a validation.dataset"
            )
        return _STREAMED[name](options)
    root = CORPORA.get(name) or Path(name).expanduser()
    if not root.exists():
        known = [*CORPORA, *_STREAMED]
        raise ConfigError(
            f"training.dataset = {name!r}: neither a known corpus ({', '.join(known)}) nor a file or "
            f"folder{did_you_mean(name, known)}"
        )
    if shard_format.is_prepared(root):
        return open_prepared(
            root,
            split=options.split,
            tokenizer=options.tokenizer,
            seq_len=options.seq_len,
            seed=options.seed,
            held_out_fraction=options.held_out_fraction,
            verify=options.verify,
        )
    if options.split != shard_format.TRAIN:
        raise ConfigError(
            f"{name} has no {options.split} split; name a validation.dataset, or hold a share of the samples "
            "out with validation.fraction"
        )
    return InMemoryCorpus(
        load_or_tokenize(find_files(root), options.tokenizer, options.bad),
        name=name,
        vocab_size=options.tokenizer.vocab_size,
        seq_len=options.seq_len,
        seed=options.seed,
        held_out_fraction=options.held_out_fraction,
    )


def _build_c4(options: SourceOptions, split: str = "train") -> SampleSource:
    from octavo.data.stream import StreamedCorpus, open_c4

    return StreamedCorpus(
        open_c4(options.dataset_path, split, options.bad),
        name="c4" if split == "train" else f"c4_{split}",
        tokenizer=options.tokenizer,
        seq_len=options.seq_len,
        seed=options.seed,
    )


_STREAMED: Mapping[str, Callable[[SourceOptions], SampleSource]] = {
    "c4": _build_c4,
    "c4_validation": lambda options: _build_c4(options, "validation"),
}
