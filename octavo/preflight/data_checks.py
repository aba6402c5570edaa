"""Checks of the data that a job names, without torch: paths, mixtures, the sizes of prepared shards.

Whether the shards were made with the job's tokenizer is checked when they are loaded.
"""

from collections.abc import Iterator
from pathlib import Path

from octavo.config import names, torchtitan
from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError, Problem, did_you_mean


def dataset(job: JobConfig) -> Iterator[Problem]:
    """What is wrong with training.dataset and its path."""
    yield from _sources(job, "training", job.training.dataset, job.training.dataset_path)


def validation(job: JobConfig) -> Iterator[Problem]:
    """What is wrong with the data of [validation], or that there is none."""
    settings = job.validation
    if settings.dataset is not None:
        yield from _sources(job, "validation", settings.dataset, settings.dataset_path)
    elif settings.dataset_path is None and settings.enable and not settings.fraction:
        yield from _validation_split(job)


def _validation_split(job: JobConfig) -> Iterator[Problem]:
    from octavo.data.dataset_spec import parse_dataset

    try:
        parts = [name for name, _ in parse_dataset(job.training.dataset, names.DATASETS)]
        lacking = [name for name in parts if not _has_validation_split(name)]
    except ConfigError:  # already reported for training.dataset
        return
    for name in lacking:
        yield job.problem(
            "validation.enable",
            f": {name} has no validation split",
            "name a validation.dataset, or hold out a share of the samples with validation.fraction",
        )


def _has_validation_split(name: str) -> bool:
    from octavo.data import shard_format

    folder = Path(name).expanduser()
    if name in names.DATASETS or not shard_format.is_prepared(folder):
        return False
    return shard_format.VALIDATION in shard_format.read_index(folder).splits


def _sources(job: JobConfig, section: str, dataset: str, dataset_path: str | None) -> Iterator[Problem]:
    """What is wrong with `section`.dataset, one source or a mixture, and with its dataset_path."""
    # Imported late to keep the start fast; free of torch.
    from octavo.data.dataset_spec import parse_dataset

    key, path_key = f"{section}.dataset", f"{section}.dataset_path"
    try:
        parts = [name for name, _ in parse_dataset(dataset, names.DATASETS)]
    except ConfigError as error:
        yield job.problem(key, f": {error}")
        return
    for name in parts:
        yield from _source(job, key, name, "" if name == dataset else f"{name} is ")
    if dataset_path is None:
        return
    if not any(name in names.STREAMED_DATASETS for name in parts):
        yield job.problem(
            path_key,
            f"has no effect with {key} = {dataset}: it applies to {', '.join(names.STREAMED_DATASETS)} only",
            f"name your own path in {key}, or unset this one (--{path_key}=None)",
        )
    elif not Path(dataset_path).expanduser().exists():
        yield job.problem(path_key, "does not exist")


def _source(job: JobConfig, key: str, name: str, subject: str) -> Iterator[Problem]:
    from octavo.data import shard_format
    from octavo.data.corpus_files import find_files

    path = Path(name).expanduser()
    if name in names.DATASETS:
        return
    if not path.exists():
        known = ", ".join(names.DATASETS)
        hint = torchtitan.missing_value("training.dataset", name) or did_you_mean(name, names.DATASETS)
        yield job.problem(key, f": {subject}neither a known corpus ({known}) nor an existing path{hint}")
        return
    try:
        if shard_format.is_prepared(path):
            shard_format.check_sizes(path, shard_format.read_index(path))
        else:
            find_files(path)
    except ConfigError as error:
        yield job.problem(key, f": {error}")
