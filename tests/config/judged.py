"""What `check` says of a command line."""

from octavo.config import ConfigError, load
from octavo.preflight import check

COMMON = ["--training.steps=300", "--training.seq_len=64"]


def problems(*argv: str, world_size: int = 1, gpus: int | None = None) -> str:
    """The message that `check` ends in, empty where the job is in order."""
    try:
        check(load([*COMMON, *argv]), world_size=world_size, gpus=gpus)
    except ConfigError as error:
        return str(error)
    return ""
