"""Builds the source of samples that a dataset option names; all its errors are raised before a model is
built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from octavo.assets import CORPORA
from octavo.core.errors import ConfigError, did_you_mean
from octavo.data import shard_format
from octavo.data.corpus import InMemoryCorpus
from octavo.data.corpus_files import find_files
from octavo.data.dataset_spec import parse_dataset
from octavo.data.mixture import Mixture
from octavo.data.prepared import open_prepared
from octavo.data.sample_source import SampleSource, SourceOptions
from octavo.data.token_cache import load_or_tokenize


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
        return open_prepared(root, options)
    if options.split != shard_format.TRAIN:
        raise ConfigError(
            f"{name} has no {options.split} split; name a validation.dataset, or hold a share of the samples "
            "out with validation.fraction"
        )
    tokens = load_or_tokenize(find_files(root), options.tokenizer, options.bad)
    return InMemoryCorpus(tokens, name, options)


def _build_c4(options: SourceOptions, split: str = "train") -> SampleSource:
    from octavo.data.stream import StreamedCorpus, open_c4

    files = open_c4(options.dataset_path, split, options.bad)
    return StreamedCorpus(files, "c4" if split == "train" else f"c4_{split}", options)


_STREAMED: Mapping[str, Callable[[SourceOptions], SampleSource]] = {
    "c4": _build_c4,
    "c4_validation": lambda options: _build_c4(options, "validation"),
}
