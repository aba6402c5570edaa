"""Checks of the data that a job names, without torch: paths, mixtures, the sizes of prepared shards.

Whether the shards were made with the job's tokenizer is checked when they are loaded.
"""

from collections.abc import Iterator
from pathlib import Path

from octavo.config import names
from octavo.config.ranges import named
from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError, did_you_mean


def dataset(job: JobConfig) -> Iterator[str]:
    """What is wrong with training.dataset and its path."""
    yield from _sources(job, "training", job.training.dataset, job.training.dataset_path)


def validation(job: JobConfig) -> Iterator[str]:
    """What is wrong with [validation]: nothing to validate on, or settings that contradict each other."""
    settings = job.validation
    if settings.dataset is not None:
        yield from _sources(job, "validation", settings.dataset, settings.dataset_path)
        if settings.fraction:
            yield (
                f"{named(job, 'validation.fraction')}: validation.dataset = {settings.dataset} is given, "
                "so nothing needs to be held out; unset one of the two"
            )
    elif settings.dataset_path is not None:
        yield f"{named(job, 'validation.dataset_path')} has no effect without validation.dataset"
    elif settings.enable and not settings.fraction:
        yield from _validation_split(job)
    if (
        settings.fraction
        and settings.dataset is None
        and settings.seq_len not in (None, job.training.seq_len)
    ):
        yield (
            f"{named(job, 'validation.seq_len')}: the samples that validation.fraction holds out have "
            f"training.seq_len = {job.training.seq_len}; leave it out, or name a validation.dataset"
        )
    long = settings.seq_len is not None and settings.seq_len > job.training.seq_len
    if long:
        yield (
            f"{named(job, 'validation.seq_len')} exceeds training.seq_len = {job.training.seq_len}, the "
            "number of positions that the model has"
        )


def _validation_split(job: JobConfig) -> Iterator[str]:
    from octavo.data.dataset_spec import parse_dataset

    try:
        parts = [name for name, _ in parse_dataset(job.training.dataset, names.DATASETS)]
        lacking = [name for name in parts if not _has_validation_split(name)]
    except ConfigError:  # already reported for training.dataset
        return
    for name in lacking:
        yield (
            f"{named(job, 'validation.enable')}: {name} has no validation split; name a "
            "validation.dataset, or hold out a share of the samples with validation.fraction"
        )


def _has_validation_split(name: str) -> bool:
    from octavo.data import shard_format

    folder = Path(name).expanduser()
    if name in names.DATASETS or not shard_format.is_prepared(folder):
        return False
    return shard_format.VALIDATION in shard_format.read_index(folder).splits


def _sources(job: JobConfig, section: str, dataset: str, dataset_path: str | None) -> Iterator[str]:
    """What is wrong with `section`.dataset, one source or a mixture, and with its dataset_path."""
    # Imported late to keep the start fast; free of torch.
    from octavo.data.dataset_spec import parse_dataset

    key = f"{section}.dataset"
    try:
        parts = [name for name, _ in parse_dataset(dataset, names.DATASETS)]
    except ConfigError as error:
        yield f"{named(job, key)}: {error}"
        return
    for name in parts:
        yield from _source(job, key, name, "" if name == dataset else f"{name} is ")
    if dataset_path is None:
        return
    if not any(name in names.STREAMED_DATASETS for name in parts):
        streamed = ", ".join(names.STREAMED_DATASETS)
        yield (
            f"{named(job, f'{section}.dataset_path')} has no effect with {key} = {dataset}: "
            f"it applies to {streamed} only. Name your own path in {key}, "
            f"or unset this one (--{section}.dataset_path=None)"
        )
    elif not Path(dataset_path).expanduser().exists():
        yield f"{named(job, f'{section}.dataset_path')} does not exist"


def _source(job: JobConfig, key: str, name: str, subject: str) -> Iterator[str]:
    from octavo.data import shard_format
    from octavo.data.corpus_files import find_files

    path = Path(name).expanduser()
    if name in names.DATASETS:
        return
    if not path.exists():
        known, hint = ", ".join(names.DATASETS), did_you_mean(name, names.DATASETS)
        yield f"{named(job, key)}: {subject}neither a known corpus ({known}) nor an existing path{hint}"
        return
    try:
        if shard_format.is_prepared(path):
            shard_format.check_sizes(path, shard_format.read_index(path))
        else:
            find_files(path)
    except ConfigError as error:
        yield f"{named(job, key)}: {error}"
