"""What a run left in its folder: `run.json`, `metrics.jsonl`, and `health.jsonl` if it measured health."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.config import ConfigError, names

SAVED_FILE = "saved.json"
"""What `octavo.commands.compare.activation_memory` writes into a run's folder."""

_NUMBER = (int, float)
_NEEDED: dict[str, Any] = {
    "step": int,
    "loss": (*_NUMBER, type(None)),
    "tokens": int,
    "tps": _NUMBER,
    "seconds": _NUMBER,
    "memory_gib": _NUMBER,
}
"""What the report of a step has, and of which type; a loss of null was not finite."""


@dataclass(frozen=True)
class RunData:
    """One run. name: in the report. kind: "baseline", "seed" (the baseline's, with another seed), "recipe" or
    "control". recipe: None is high precision. reports: the lines of its metrics that tell a loss, one a step,
    ascending. exit_code: None where it is not known to have ended.
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
    """That its model keeps for backward, where it was measured."""
    losses: Mapping[int, float] = field(init=False)
    """Step -> loss; NaN where it was not finite."""

    def __post_init__(self) -> None:
        losses = {r["step"]: math.nan if r["loss"] is None else float(r["loss"]) for r in self.reports}
        object.__setattr__(self, "losses", losses)

    @property
    def data_seed(self) -> int:
        """Of the order of its batches."""
        training = self.config["training"]
        found = training.get("data_seed")
        return int(training["seed"] if found is None else found)

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        """The configuration it was started with."""
        found: Mapping[str, Mapping[str, Any]] = self.record["config"]
        return found

    def tokens_beside(self, other: "RunData") -> tuple[int, int]:
        """The tokens that it and `other` had read by the last step that both report; 0 if there is none.

        A configuration alone does not tell how large a step is: the number of processes may decide it.
        """
        mine, theirs = ({line["step"]: line["tokens"] for line in run.reports} for run in (self, other))
        last = max(mine.keys() & theirs.keys(), default=0)
        return mine.get(last, 0), theirs.get(last, 0)

    def reads_as(self, other: "RunData") -> bool:
        """Whether it read the batches of `other`, in their order."""
        mine, theirs = self.tokens_beside(other)
        return self.data_seed == other.data_seed and mine == theirs


def load_run(folder: Path, *, name: str | None = None, **known: Any) -> RunData:
    """Read `folder`. known: fields of `RunData` that are known better than the folder tells.

    Raises:
        ConfigError: if it is no run's folder, or has no loss.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no run's folder: there is no run.json (it is what job.dump_folder names, as in "
            "./run_train.sh --job.dump_folder=…)"
        )
    try:
        record = json.loads(path.read_text())
        config = record["config"]
        recipe = None
        if "float8" in config["model"]["converters"]:
            recipe = record["precision"]
        seed = int(config["training"]["seed"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path}: is not what a run of octavo writes") from None
    path = folder / "metrics.jsonl"
    lines = list(_lines(path))
    reports = {line["step"]: line for line in lines if "loss" in line and _is_report(path, line)}
    if not reports:
        raise ConfigError(f"{folder}: metrics.jsonl tells no loss; the run has not begun, or was put aside")
    return RunData(
        **{
            "name": name or folder.name or str(folder),
            "kind": _kind(recipe),
            "folder": folder,
            "recipe": recipe,
            "seed": seed,
            "record": record,
            "reports": tuple(reports[step] for step in sorted(reports)),
            "validations": tuple(line for line in lines if "validation_loss" in line),
            "health": tuple(_lines(folder / "health.jsonl")),
            "saved_bytes": next((line.get("bytes") for line in _lines(folder / SAVED_FILE)), None),
            **known,
        }
    )


def _kind(recipe: str | None) -> str:
    if recipe is None:
        return "baseline"
    return "control" if recipe in names.CONTROLS else "recipe"


def _is_report(path: Path, line: Mapping[str, Any]) -> bool:
    """Whether a line that tells a loss has all that a report needs; it is an error if not."""
    for key, kinds in _NEEDED.items():
        value = line.get(key)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ConfigError(
                f"{path}: {key} is {value!r} where a number has to be, in the line of step "
                f"{line.get('step')}: the file is damaged. Delete that line, or train the run again"
            )
    return True


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; none if it is not there. A torn last line is passed over: its
    run was killed, or is still writing.
    """
    try:
        written = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(written, 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            yield found
        elif number < len(written):
            raise ConfigError(f"{path}, line {number}: is no object of JSON; the file is damaged")
