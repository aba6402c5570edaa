"""Experiment trackers, in addition to `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

All trackers get the same tags, which match torchtitan's dashboards. A missing package, or a service that
refuses the login, is a `ConfigError` before training. A tracker that fails later is disabled with one
warning; the run continues.

Each service reads its own environment variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, TRACKIO_PROJECT,
TRACKIO_SPACE_ID, …). octavo neither reads nor logs API keys, and `redact` has removed secrets from the
configuration that is sent.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from octavo.config import ConfigError
from octavo.core.fs import write_file
from octavo.core.logging import logger
from octavo.core.secrets import redact

_ID_FILE = "{}_run"


class Tracker(Protocol):
    """Receives the metrics of each reported step."""

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "metrics.enable_tensorboard = true: the package tensorboard is not installed; "
                "pip install tensorboard, or leave it off (metrics.jsonl is always written)"
            ) from None
        self._writer = SummaryWriter(str(folder), max_queue=1000)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


def _import(package: str) -> ModuleType:
    key = f"metrics.enable_{package}"
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = (error.name or package).partition(".")[0]
        raise ConfigError(
            f"{key} = true: the package {missing} is not installed; pip install {missing}, or leave it off "
            "(metrics.jsonl is always written)"
        ) from None


def _run_id(folder: Path, package: str, *, resumed: bool) -> str:
    """The run id, created at the start and stored in `folder`, so that a resumed run keeps it."""
    path = folder / _ID_FILE.format(package)
    if not (resumed and path.exists()):
        write_file(path, f"{folder.resolve().name}-{os.urandom(4).hex()}\n")
    return path.read_text().strip()


class Service:
    """wandb or trackio, whose calls have the same form: init, log and finish.

    A resumed run keeps its id. The step is also logged as a value, because a run that went back to a
    checkpoint logs some steps twice, and wandb drops values older than its own step counter.
    """

    def __init__(
        self, package: str, folder: Path, config: Mapping[str, Any], description: str, *, resumed: bool
    ):
        self._name, self._failed = package, False
        self._package = _import(package)
        name = _run_id(folder, package, resumed=resumed)
        project = os.environ.get(f"{package.upper()}_PROJECT", "octavo")
        options: dict[str, Any] = {"project": project, "config": dict(config), "resume": "allow"}
        if package == "wandb":
            options |= {
                "id": os.environ.get("WANDB_RUN_ID", name),
                "name": os.environ.get("WANDB_NAME", name),
                "entity": os.environ.get("WANDB_TEAM") or os.environ.get("WANDB_ENTITY"),
                "dir": str(folder),
                "notes": redact(description),
            }
        else:
            options["name"] = name
        try:
            self._run = self._package.init(**options)
            if package == "wandb":
                self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of many types: no key, no network, no such project
            raise ConfigError(
                f"metrics.enable_{package} = true: {package} did not start: "
                f"{redact(f'{type(error).__name__}: {error}')}; leave it off to train without it"
            ) from None
        logger.info("%s: run %s of project %s", package, name, project)

    def write(self, values: Mapping[str, float], step: int) -> None:
        if self._name == "trackio":
            self._guarded(lambda: self._package.log(dict(values), step=step))
        else:
            self._guarded(lambda: self._run.log({**values, "step": step}))

    def close(self) -> None:
        self._guarded(self._package.finish)

    def _guarded(self, call: Any) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            logger.warning(
                "%s failed and is disabled (metrics.jsonl has all values): %s",
                self._name,
                redact(f"{type(error).__name__}: {error}"),
            )
