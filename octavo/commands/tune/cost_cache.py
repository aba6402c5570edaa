"""Caches measured costs in a JSON file under ~/.cache/octavo (or XDG_CACHE_HOME).

The key of a measurement is all that it depends on: the GPU's name, the versions of torch, CUDA, triton and
octavo, the size, and the recipe. An unreadable file counts as empty, and a failed write is only reported,
because measurements can be repeated.
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


def default_cache_path() -> Path:
    return cache_folder() / "tune.json"


def describe_machine(device: torch.device) -> str:
    """All that a measurement on `device` depends on, except the size and the recipe."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return (
        f"{name}; torch {torch.__version__}; CUDA {torch.version.cuda}; triton {triton}; "
        f"octavo {octavo.__version__}"
    )


class CostCache:
    """The costs measured on one machine. `path` None: nothing is read or written."""

    def __init__(self, path: Path | None, machine: str):
        self._path, self._machine = path, machine
        self._costs: dict[str, dict[str, Any]] = self._read().get(machine, {})

    def _read(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text())
            return dict(content["machines"]) if content.get("format") == FORMAT else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def look_up(self, size: Size, candidates: Sequence[str]) -> Costs | None:
        """The costs of `size` if those of all `candidates` are known, since they are measured in turn."""
        costs = self._costs.get(str(size), {})
        try:
            return {name: CostParts(**costs[name]) for name in candidates}
        except (KeyError, TypeError):
            return None

    def store(self, size: Size, costs: Costs) -> str | None:
        """Add the costs of `size` to the file; returns an error message, or None."""
        self._costs[str(size)] = {name: asdict(parts) for name, parts in costs.items()}
        if self._path is None:
            return None
        content = {"format": FORMAT, "machines": self._read() | {self._machine: self._costs}}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps(content, indent=1))
        except OSError as error:
            return f"{self._path}: {error.strerror or error}"
        return None
