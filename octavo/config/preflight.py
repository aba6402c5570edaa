"""Judging a job before torch is imported."""

from octavo.config.schema import JobConfig


def check(job: JobConfig, *, world_size: int, gpus: int | None = None) -> None:
    """Raise ConfigError where the job cannot run."""
