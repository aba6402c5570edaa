"""Save and resume with torch.distributed.checkpoint (DCP).

    <folder>/step-20/             one checkpoint: DCP's shards and .metadata, tensors only
    <folder>/step-20/state.json   what is not a tensor: step, tokens, data position, versions
    <folder>/step-20.tmp/         one being written; never read, removed by the next save of that step

Tensors go by their plain parameter names, so a checkpoint does not depend on compile, activation
checkpointing, float8 or the number of processes. A folder gets its final name only after every process has
written its part, so what has that name is complete. `state.json` is written last within it.
"""

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from octavo.checkpoint.errors import DamagedCheckpoint
from octavo.checkpoint.reader import Reader
from octavo.components.logging import logger
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint

_STEP = re.compile(r"step-(\d+)")
_STATE = "state.json"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir() if (path / _STATE).is_file())
    return sorted(int(match[1]) for match in names if match)


class Checkpointer:
    """Saves `model` and `optimizer` into `folder` and loads them back.

    What else a run needs is passed as `state`, a JSON-able dict, the same on every process.
    """

    def __init__(
        self, settings: Checkpoint, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
    ):
        self._settings = settings
        self._folder = folder
        self._model = model
        self._optimizer = optimizer
        self._pending: tuple[Future[Any], int] | None = None
        self._group = dist.new_group(backend="gloo") if settings.async_mode == "async" else None

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` ends with a save: at the interval, and at the end of the run."""
        return self._settings.enable and (step % self._settings.interval == 0 or step == last_step)

    def save(self, step: int, last_step: int, state: dict[str, Any]) -> None:
        """Write step `step`. With `async_mode = "async"` this returns when the tensors are copied."""
        self.wait()
        model_only = step == last_step and self._settings.last_save_model_only
        tensors: dict[str, Any] = {"model": get_model_state_dict(self._model)}
        if not model_only:
            tensors["optimizer"] = get_optimizer_state_dict(self._model, self._optimizer)["state"]
            tensors["rng"] = {str(dist.get_rank()): torch.get_rng_state()}
        state = {"step": step, "model_only": model_only, "world_size": dist.get_world_size(), **state}

        partial = self._path(step, ".tmp")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "next_state.json").write_text(json.dumps(state, indent=1))
        dist.barrier()
        if self._group is None:
            dcp.save(tensors, checkpoint_id=partial)
            self._publish(step)
        else:
            future = dcp.async_save(tensors, checkpoint_id=partial, process_group=self._group)
            assert isinstance(future, Future)
            self._pending = (future, step)

    def wait(self) -> None:
        """Finish a save that is under way."""
        if self._pending is not None:
            future, step = self._pending
            self._pending = None
            future.result()
            self._publish(step)

    def poll(self) -> None:
        """Publish an asynchronous save if every process has written its part."""
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending[0].done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._group)
        if done.item():
            self.wait()

    def _path(self, step: int, suffix: str = "") -> Path:
        return self._folder / f"step-{step}{suffix}"

    def _publish(self, step: int) -> None:
        """Give a written checkpoint its name, on rank 0 once all are through, and drop what is too old."""
        dist.barrier()
        if dist.get_rank() == 0:
            partial, final = self._path(step, ".tmp"), self._path(step)
            (partial / "next_state.json").rename(partial / _STATE)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            keep = self._settings.keep_latest_k
            for old in saved_steps(self._folder)[:-keep] if keep else []:
                shutil.rmtree(self._path(old))
            logger.info("Saved checkpoint %s", final)
        dist.barrier()

    def load(self) -> dict[str, Any] | None:
        """Load `checkpoint.load_step`, or the newest step where it is -1, in place; returns its `state`.

        None where there is no checkpoint, or `checkpoint.enable` is false. `ConfigError` if the step asked
        for is not there, cannot be continued, or does not fit the model.
        """
        steps = saved_steps(self._folder) if self._settings.enable else []
        wanted = self._settings.load_step
        if not steps and wanted < 0:
            return None
        step = steps[-1] if wanted < 0 else wanted
        if step not in steps:
            raise ConfigError(f"checkpoint.load_step = {step}: {self._folder} has steps {steps}")
        path = self._path(step)
        try:
            return self._load(path)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if isinstance(error, ConfigError) and not isinstance(error, DamagedCheckpoint):
                raise
            earlier = [s for s in steps if s < step]
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}): it is damaged; "
                f"remove it, or set checkpoint.load_step to an earlier step, of {earlier}"
            ) from error

    def _load(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((path / _STATE).read_text())
        if state["model_only"]:
            raise ConfigError(
                f"{path} holds the model only (checkpoint.last_save_model_only): training cannot go on "
                "from it; set checkpoint.load_step to an earlier step, or checkpoint.folder to a new folder"
            )
        self._load_tensors(path, same_world=state["world_size"] == dist.get_world_size())
        return state

    def _load_tensors(self, path: Path, *, same_world: bool) -> None:
        optimizer_state = get_optimizer_state_dict(self._model, self._optimizer)
        tensors: dict[str, Any] = {
            "model": get_model_state_dict(self._model),
            "optimizer": optimizer_state["state"],
        }
        rank = str(dist.get_rank())
        if same_world:
            tensors["rng"] = {rank: torch.get_rng_state()}
        reader = Reader(path)
        _check_fit(reader, tensors["model"])
        dcp.load(tensors, storage_reader=reader)
        set_model_state_dict(self._model, tensors["model"])
        set_optimizer_state_dict(self._model, self._optimizer, optimizer_state)
        if same_world:
            torch.set_rng_state(tensors["rng"][rank])


def _check_fit(reader: Reader, model_state: dict[str, Any]) -> None:
    """`ConfigError` that names the first parameters which the checkpoint lacks or has in another shape."""
    saved = reader.metadata.state_dict_metadata
    wrong = []
    for name, tensor in model_state.items():
        found = saved.get(f"model.{name}")
        if found is None:
            wrong.append(f"{name} is not in it")
        elif not isinstance(found, TensorStorageMetadata) or tuple(found.size) != tuple(tensor.shape):
            shape = tuple(getattr(found, "size", ()))
            wrong.append(f"{name} is {shape} in it and {tuple(tensor.shape)} in the model")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{reader.folder} does not fit this model: {'; '.join(wrong[:3])}{more}. "
            "Set model.flavor and model.hf_assets_path as they were, or checkpoint.folder to a new folder"
        )
