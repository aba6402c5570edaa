"""The files of a corpus, in the order of their paths, so that a folder is the same corpus everywhere."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from octavo.core.errors import ConfigError

FORMATS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def find_files(root: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """The readable files at or below `root`, in order of path; hidden files and folders are passed over.

    Raises:
        ConfigError: `root` does not exist, or holds no file of a known format.
    """
    if root.is_file():
        if not root.name.lower().endswith(formats):
            raise ConfigError(f"{root}: not a format that can be read; known are {', '.join(formats)}")
        return [root]
    if not root.is_dir():
        raise ConfigError(
            f"{root}: no such file or folder; give the path of a folder of {', '.join(formats)} files"
        )
    found, others, visited = [], Counter[str](), set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link that leads back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(formats):
                found.append(Path(folder, name))
            else:
                others[Path(name).suffix or "no suffix"] += 1
    if not found:
        seen = (
            ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(5)) or "no files at all"
        )
        raise ConfigError(
            f"{root}: no file of a format that can be read ({', '.join(formats)}); found {seen}"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
