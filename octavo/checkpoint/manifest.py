"""`manifest.json`: what a checkpoint must hold to be relied on. It is written last.

It names every file with its size and hashes, and where the checkpoint comes from: step, number of processes,
layout, a hash of the configuration, versions. It ends with a hash of itself, and the file must be what these
values are written as to the byte, so that damage to the manifest is found as well.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint
from octavo.checkpoint.hashing import ALGORITHMS, BLOCK, Content

FILE = "manifest.json"
FORMAT = "octavo checkpoint 1"


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """A short name of a configuration: equal for equal ones."""
    return _digest(config)[:16]


def render(step: int, algorithm: str, files: Mapping[str, Content], about: Mapping[str, Any]) -> bytes:
    """The manifest of a checkpoint, as its file holds it. `about`: what is kept for a reader's sake."""
    return _written(
        {
            "format": FORMAT,
            "step": step,
            **about,
            "hash": algorithm,
            "block_bytes": BLOCK,
            "files": {
                name: {"bytes": files[name].bytes, "blocks": list(files[name].blocks)}
                for name in sorted(files)
            },
        }
    )


def _written(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps({**fields, "sha256_of_the_above": _digest(fields)}, indent=1) + "\n").encode()


def _name(name: str) -> str:
    """`name`, if it is that of a file in the checkpoint's own folder; else a ValueError."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(name)
    return name


def read(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`; "files" maps names to `Content`.

    Raises `DamagedCheckpoint` if it is missing, not what was written, of a format that is not known here, or
    of another step than `step`.
    """
    path = folder / FILE
    try:
        raw = path.read_bytes()
        fields = json.loads(raw)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{FILE}: missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{FILE}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{FILE}: no JSON ({error})") from None
    if not isinstance(fields, dict) or "sha256_of_the_above" not in fields:
        raise DamagedCheckpoint(f"{FILE}: no manifest of octavo's")
    del fields["sha256_of_the_above"]
    if _written(fields) != raw:
        raise DamagedCheckpoint(f"{FILE}: hash differs")
    if fields.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{FILE}: foreign: format {fields.get('format')!r}, not {FORMAT!r}")
    if step is not None and fields.get("step") != step:
        raise DamagedCheckpoint(f"{FILE}: foreign: it is of step {fields.get('step')}")
    if fields.get("hash") not in ALGORITHMS or fields.get("block_bytes") != BLOCK:
        raise DamagedCheckpoint(f"{FILE}: foreign: hash {fields.get('hash')!r} is not known here")
    try:
        fields["files"] = {
            _name(name): Content(int(entry["bytes"]), tuple(map(str, entry["blocks"])))
            for name, entry in fields["files"].items()
        }
    except (TypeError, ValueError, LookupError, AttributeError):
        raise DamagedCheckpoint(f"{FILE}: foreign: its list of files is no such list") from None
    return fields
