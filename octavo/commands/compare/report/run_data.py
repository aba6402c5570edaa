"""Reads a run's folder: `run.json`, `metrics.jsonl`, and `health.jsonl` if it measured health."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.config import ConfigError, names

SAVED_FILE = "saved.json"
"""The file that `octavo.commands.compare.activation_memory` writes into a run's folder."""

_NUMBER = (int, float)
_REQUIRED: dict[str, Any] = {
    "step": int,
    "loss": (*_NUMBER, type(None)),
    "tokens": int,
    "tps": _NUMBER,
    "seconds": _NUMBER,
    "memory_gib": _NUMBER,
}
"""Keys and types of a step's report; a loss of null was not finite."""


@dataclass(frozen=True)
class RunData:
    """One run. name: in the report. kind: "baseline", "seed" (the baseline with another seed), "recipe" or
    "control". recipe: None is high precision. reports: the lines of its metrics with a loss, one per step,
    ascending. exit_code: None if not known. saved_bytes: its activation memory, if measured.
    """

    name: str
    kind: str
    folder: Path
    recipe: str | None
    seed: int
    record: Mapping[str, Any]
    reports: tuple[Mapping[str, Any], ...]
    validations: tuple[Mapping[str, Any], ...]
    health: tuple[Mapping[str, Any], ...] = ()
    exit_code: int | None = None
    command: str = ""
    saved_bytes: int | None = None
    losses: Mapping[int, float] = field(init=False)
    """Step -> loss; NaN if it was not finite."""

    def __post_init__(self) -> None:
        losses = {r["step"]: math.nan if r["loss"] is None else float(r["loss"]) for r in self.reports}
        object.__setattr__(self, "losses", losses)

    @property
    def data_seed(self) -> int:
        """The seed of the order of its batches."""
        training = self.config["training"]
        seed = training.get("data_seed")
        return int(training["seed"] if seed is None else seed)

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        config: Mapping[str, Mapping[str, Any]] = self.record["config"]
        return config

    def common_tokens(self, other: "RunData") -> tuple[int, int]:
        """Tokens that this run and `other` had read by the last step that both report; 0 if there is none.

        The configuration does not determine the tokens per step: the number of processes may.
        """
        own, others = ({line["step"]: line["tokens"] for line in run.reports} for run in (self, other))
        last = max(own.keys() & others.keys(), default=0)
        return own.get(last, 0), others.get(last, 0)

    def read_same_batches_as(self, other: "RunData") -> bool:
        """Whether both read the same batches in the same order."""
        own, others = self.common_tokens(other)
        return self.data_seed == other.data_seed and own == others


def load_run(folder: Path, *, name: str | None = None, **fields: Any) -> RunData:
    """Read a run's folder. fields: replace those of `RunData` that are read from the folder.

    Raises:
        ConfigError: it is not a run's folder, is damaged, or has no loss.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a run's folder: there is no run.json (give the folder in job.dump_folder, as "
            "in ./run_train.sh --job.dump_folder=…)"
        )
    try:
        record = json.loads(path.read_text())
        config = record["config"]
        recipe = record["precision"] if "float8" in config["model"]["converters"] else None
        seed = int(config["training"]["seed"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path}: was not written by a run of octavo, or is damaged") from None
    path = folder / "metrics.jsonl"
    lines = list(_read_json_lines(path))
    reports = {line["step"]: line for line in lines if "loss" in line and _check_report(path, line)}
    if not reports:
        raise ConfigError(f"{folder}: metrics.jsonl has no loss; the run has not begun, or was moved")
    values = {
        "kind": "baseline" if recipe is None else "control" if recipe in names.CONTROLS else "recipe",
        "recipe": recipe,
        "seed": seed,
        "saved_bytes": next((line.get("bytes") for line in _read_json_lines(folder / SAVED_FILE)), None),
    }
    return RunData(
        name=name or folder.name or str(folder),
        folder=folder,
        record=record,
        reports=tuple(reports[step] for step in sorted(reports)),
        validations=tuple(line for line in lines if "validation_loss" in line),
        health=tuple(_read_json_lines(folder / "health.jsonl")),
        **{**values, **fields},
    )


def _check_report(path: Path, line: Mapping[str, Any]) -> bool:
    """Return True if a line with a loss has all that a report needs; raises `ConfigError` if not."""
    for key, types in _REQUIRED.items():
        value = line.get(key)
        if isinstance(value, bool) or not isinstance(value, types):
            raise ConfigError(
                f"{path}: {key} is {value!r} instead of a number, in the line of step {line.get('step')}; "
                "the file is damaged. Delete that line, or train the run again"
            )
    return True


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines; none if it is missing. A torn last line is skipped: its run
    was killed, or is still writing.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            yield content
        elif number < len(lines):
            raise ConfigError(f"{path}, line {number}: is not a JSON object; the file is damaged")
