"""Costs measured before, by GPU and software: a JSON file under ~/.cache/octavo (or XDG_CACHE_HOME).

The key of a measurement is all that it depends on: the GPU's name, the versions of torch, CUDA, triton and
octavo, the size, and the recipe. A file that cannot be read counts as empty, and one that cannot be written
is told, since a measurement can be repeated.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.commands.tune.linear_sizes import Size
from octavo.commands.tune.recipe_costs import CostParts, Costs
from octavo.core.cache_dir import cache_folder
from octavo.core.fs import write_file

FORMAT = 1


def default_path() -> Path:
    """Where measurements are kept."""
    return cache_folder() / "tune.json"


def machine(device: torch.device) -> str:
    """All that a measurement on `device` depends on but the size and the recipe."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return (
        f"{name}; torch {torch.__version__}; CUDA {torch.version.cuda}; triton {triton}; "
        f"octavo {octavo.__version__}"
    )


class Cache:
    """What was measured on one machine. `path` None: nothing is read or written."""

    def __init__(self, path: Path | None, machine: str):
        self._path, self._machine = path, machine
        self._known: dict[str, dict[str, Any]] = self._whole().get(machine, {})

    def _whole(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            whole = json.loads(self._path.read_text())
            return dict(whole["machines"]) if whole.get("format") == FORMAT else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def look_up(self, size: Size, candidates: Sequence[str]) -> Costs | None:
        """The costs of `size`, if those of all `candidates` are known: they were measured in turn."""
        found = self._known.get(str(size), {})
        try:
            return {name: CostParts(**found[name]) for name in candidates}
        except (KeyError, TypeError):
            return None

    def keep(self, size: Size, costs: Costs) -> str | None:
        """Write them down. Returns why that failed, or None."""
        self._known[str(size)] = {name: asdict(parts) for name, parts in costs.items()}
        if self._path is None:
            return None
        whole = {"format": FORMAT, "machines": self._whole() | {self._machine: self._known}}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps(whole, indent=1))
        except OSError as error:
            return f"{self._path}: {error.strerror or error}"
        return None
