"""Checks of single options, by what their fields in `schema.py` say: ranges, effects, GPUs, packages."""

import importlib.util
from collections.abc import Iterator

from octavo.config.needs import Needs
from octavo.config.options import NeedsGpu, NeedsPackage
from octavo.config.ranges import Range
from octavo.config.schema import OPTIONS, JobConfig
from octavo.core.errors import Problem


def out_of_range(job: JobConfig) -> Iterator[Problem]:
    """Values out of their range."""
    for name, option in OPTIONS.items():
        value = job.get(name)
        for allowed in option.noted(Range):
            if value is not None and not allowed.holds(value):
                yield job.problem(name, allowed.must)
                break


def without_effect(job: JobConfig, processes: int) -> Iterator[Problem]:
    """Flags on the command line that have no effect; each with the first of its needs that is not met."""
    for name in (name for name, source in job.given.items() if source == "cli"):
        for need in OPTIONS[name].noted(Needs):
            if not need.met(job, processes):
                where = job.where[name]
                yield Problem(f"{where} would have no effect: {need.why}", need.remedy, name, where)
                break


def without_gpu(job: JobConfig) -> Iterator[Problem]:
    """Settings that need a GPU."""
    for name, option in OPTIONS.items():
        if any(job.get(name) in note.values for note in option.noted(NeedsGpu)):
            yield job.problem(name, "needs a GPU, and this machine has none")


def without_package(job: JobConfig) -> Iterator[Problem]:
    """Settings that need a package that is not installed."""
    for name, option in OPTIONS.items():
        for note in option.noted(NeedsPackage):
            if job.get(name) in note.values and importlib.util.find_spec(note.package) is None:
                what = f"needs the package {note.package}"
                yield job.problem(name, what, f"pip install {note.source}", valid=True)
