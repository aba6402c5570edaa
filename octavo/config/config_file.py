"""Finds a TOML file by its path (with `~`), or by the bare name of one that octavo ships.

CONFIG_FILE, `--job.config_file` and the training processes all use it, so one name means one file everywhere.
"""

import os
import stat
from pathlib import Path

from octavo.core.errors import ConfigError

_MODELS = Path(__file__).parents[1] / "models"
TRAIN_CONFIGS = _MODELS / "llama3" / "train_configs"
"""The folder of the default config."""


def shipped_configs() -> dict[str, Path]:
    """The TOML files of all families, by their names."""
    return {file.name: file for file in sorted(_MODELS.glob("*/train_configs/*.toml"), key=lambda f: f.name)}


def find(name: str) -> Path:
    """The file called `name`; one in the working directory takes precedence over a shipped one.

    Raises:
        ConfigError: what is wrong with `name`, without repeating it.
    """
    shipped = shipped_configs()
    if not name:
        raise ConfigError("name a file")
    try:
        path = Path(name).expanduser()
        if name in shipped and not path.exists():
            path = shipped[name]
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"no such file in {os.getcwd()}; octavo ships: {', '.join(shipped)}") from None
    except RuntimeError:
        raise ConfigError(f"there is no home folder {Path(name).parts[0]}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise ConfigError("is a folder; name the .toml file in it")
    if stat.S_ISFIFO(mode):
        raise ConfigError("is a pipe, which only one process could read; name a file")
    return path
