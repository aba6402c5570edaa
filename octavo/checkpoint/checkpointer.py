"""Saves and loads checkpoints; this is the interface of the trainer.

    <folder>/step-20/                a checkpoint: DCP's shards and .metadata, tensors only
    <folder>/step-20/state.json      step, tokens, data position, config, versions: all that is not a tensor
    <folder>/step-20/manifest.json   sizes and hashes of all files; see `manifest.py`

Tensors have their plain parameter names, so a checkpoint is independent of compile, activation checkpointing,
float8 and the number of processes. `store.py` publishes atomically, `saving.py` does one save, `loading.py`
the collective steps of loading, and `reader.py` reads a checkpoint without running code from it.

An asynchronous save copies the tensors and writes them with the same code in a thread. The thread has its own
process group, so that its collectives and training's never wait for each other.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from octavo.checkpoint import failpoints, rng
from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, SavesFailed
from octavo.checkpoint.loading import check_fit, exclude_parts, open_by_ranks, restore_rng, verify_by_ranks
from octavo.checkpoint.saving import (
    PendingSave,
    SaveResult,
    Snapshot,
    broadcast_from_rank_0,
    describe_failure,
    write_checkpoint,
)
from octavo.checkpoint.store import Store, none_verifies, published_steps, step_folder, summarize
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint
from octavo.core.format import format_bytes
from octavo.core.logging import logger
from octavo.distributed.mesh import disk_group


class Checkpointer:
    """Saves `model` and `optimizer` into `folder` and loads them back.

    Other state of a run is passed as `state`, a JSON-able dict that is equal on all processes. A checkpoint
    verifies only if its state has the fields in `needs`.
    """

    def __init__(
        self,
        settings: Checkpoint,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        needs: Sequence[str] = (),
    ):
        self._needs = needs
        self._settings = settings
        self._folder = folder
        self._excluded = frozenset(settings.exclude_from_loading)
        self._model = model
        self._optimizer = optimizer
        self._store = Store(folder, keep=settings.keep_latest_k, algorithm=settings.hash)
        self._stagers: dict[str, BlockingAsyncStager] = {}
        self._pending: PendingSave | None = None
        self._failures = 0  # in a row
        self._paused = 0.0
        self._pause_began = 0.0
        self._last_step: int | None = None
        self.last_saved: int | None = None
        """The last step that this process published, None before the first."""
        self.found_checkpoints = False
        """Whether `load` found checkpoints in the folder, damaged or not."""
        if dist.is_initialized():
            self._control = disk_group()
            self._writing = disk_group()

    def due(self, step: int, last_step: int) -> bool:
        """Whether to save after `step`: at the interval, and at the end of the run."""
        saves = self._settings.enable and not self._settings.load_only
        return saves and (step % self._settings.interval == 0 or step == last_step)

    def save(self, step: int, last_step: int, state: dict[str, Any]) -> None:
        """Save `step`. An asynchronous save returns when the tensors are copied; see `poll`.

        A failed save is logged. Raises `SavesFailed` after `checkpoint.max_failed_saves` failures in a row,
        or if the save of the last step fails.
        """
        with self._pausing_training():
            self._finish_pending()
            snapshot = self._take_snapshot(step, last_step, state)
            final = step == last_step
            if self._settings.async_mode == "disabled":
                self._report(step, final, write_checkpoint(snapshot, self._store, self._writing))
            else:
                staged = self._stage(snapshot)
                seconds = time.perf_counter() - self._pause_began
                self._pending = PendingSave(staged, final, seconds, self._store, self._writing)

    def poll(self) -> None:
        """Report an asynchronous save if all processes have finished it. Raises as `save` does."""
        if self._pending is None:
            return
        with self._pausing_training():
            done = torch.tensor(int(self._pending.done()))
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._control)
            if done.item():
                self._finish_pending()

    def wait(self) -> None:
        """Wait for an asynchronous save to finish. Raises as `save` does."""
        if self._pending is None:
            return
        with self._pausing_training():
            self._finish_pending()

    def take_paused_seconds(self) -> float:
        """The seconds that training paused for saves since the last call."""
        paused, self._paused = self._paused, 0.0
        return paused

    @contextmanager
    def _pausing_training(self) -> Iterator[None]:
        self._pause_began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - self._pause_began

    def _take_snapshot(self, step: int, last_step: int, state: dict[str, Any]) -> Snapshot:
        model_only = step == last_step and self._settings.last_save_model_only
        tensors: dict[str, Any] = {"model": get_model_state_dict(self._model)}
        if not model_only:
            if step > 0:  # before its first step an optimizer has no state, and this call would create it
                tensors["optimizer"] = get_optimizer_state_dict(self._model, self._optimizer)["state"]
            tensors["rng"] = {str(dist.get_rank()): rng.capture()}
        state = {"step": step, "model_only": model_only, "world_size": dist.get_world_size(), **state}
        return Snapshot(step, tensors, state)

    def _stage(self, snapshot: Snapshot) -> Snapshot:
        """Copy the tensors of `snapshot`."""
        pinned = self._settings.async_mode == "async_with_pinned_mem"
        staged = {}
        for part, tensors in snapshot.tensors.items():
            stager = self._stagers.setdefault(part, BlockingAsyncStager(cache_staged_state_dict=pinned))
            staged[part] = stager.stage(tensors)
            failpoints.reach("during staging")
        return Snapshot(snapshot.step, staged, snapshot.state)

    def _finish_pending(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._report(pending.step, pending.final, pending.result(), pending.paused)

    def _report(self, step: int, final: bool, result: SaveResult, paused: float = 0.0) -> None:
        """Log the result of a save and count failures; the same on every rank.

        `paused`: seconds that training paused for it in earlier calls.
        """
        path = step_folder(self._folder, step)
        if result.problem is None:
            self._failures, self.last_saved = 0, step
            if dist.get_rank() == 0:
                logger.info(
                    "Saved checkpoint %s: %s in %.2f s, training paused for %.2f s",
                    path,
                    format_bytes(result.bytes),
                    result.seconds,
                    paused + time.perf_counter() - self._pause_began,
                )
                for note in result.notes:
                    logger.info("Checkpoints: %s", note)
            return
        self._failures += 1
        limit = self._settings.max_failed_saves
        message = f"{path} was not saved: {result.problem}"
        if final:
            raise SavesFailed(f"{message}. It was the last save; the steps since the one before are lost")
        if self._failures >= limit:
            raise SavesFailed(
                f"{message}. That is failure {self._failures} in a row (checkpoint.max_failed_saves)"
            )
        if dist.get_rank() == 0:
            logger.warning(
                "%s. Training continues; %d more in a row end the run (checkpoint.max_failed_saves = %d)",
                message,
                limit - self._failures,
                limit,
            )

    def load(self, last_step: int | None = None) -> dict[str, Any] | None:
        """Load the step of `checkpoint.load_step`, or for -1 the newest step that verifies.

        After this run has saved, `load_step` no longer applies: its last save is loaded. Model, optimizer and
        random number generators are set in place. A checkpoint of the model only is accepted if the run is
        over, that is if its step is `last_step` or later.

        Returns:
            The saved state, with "not_exact": part -> why it differs from the saved one. None if there is no
            checkpoint, or `checkpoint.enable` is false.

        Raises:
            NoCheckpointVerifies: there are checkpoints, and none verifies.
            ConfigError: the requested step is missing or does not verify, the checkpoint cannot be continued,
                or it does not fit the model.
        """
        if not self._settings.enable:
            return None
        self.wait()
        self._last_step = last_step
        steps = broadcast_from_rank_0(self._list_steps(), self._control)
        self.found_checkpoints = bool(steps)
        if (step := self._settings.load_step) >= 0:
            excluded = self._excluded
            if self.last_saved is not None:
                step, excluded = self.last_saved, frozenset()
            option = f"checkpoint.load_step = {step}"
            if step not in steps:
                raise ConfigError(f"{option}: {self._folder} has steps {steps}")
            return self._load_or_raise(step_folder(self._folder, step), step, excluded, option)
        problems: dict[int, list[str]] = {}
        for step in reversed(steps):
            path = step_folder(self._folder, step)
            state, problems[step] = self._load_if_valid(path, step)
            if state is not None:
                return state
            if dist.get_rank() == 0:
                logger.warning("%s does not verify and is skipped: %s", path, summarize(problems[step]))
        if problems:
            raise none_verifies(self._folder, problems)
        return None

    def _list_steps(self) -> list[int]:
        """On rank 0: remove unfinished checkpoints of an earlier run; the published steps."""
        if dist.get_rank() != 0:
            return []
        for name in self._store.remove_unfinished():
            logger.info("Removed %s, which an earlier run left unfinished", self._folder / name)
        return published_steps(self._folder)

    def load_initial(self, path: Path) -> dict[str, Any]:
        """Load another run's checkpoint without `checkpoint.exclude_from_loading`; see `load`."""
        return self._load_or_raise(path, None, self._excluded, "checkpoint.initial_load_path")

    def _load_or_raise(
        self, path: Path, step: int | None, excluded: frozenset[str], option: str
    ) -> dict[str, Any]:
        state, problems = self._load_if_valid(path, step, excluded)
        if state is None:
            raise DamagedCheckpoint(f"{option}: {path} does not verify: {summarize(problems)}")
        return state

    def _load_if_valid(
        self, path: Path, step: int | None, excluded: frozenset[str] = frozenset()
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Load a checkpoint if it verifies: its state, or None and its problems. The same on every rank.

        `step`: that of a checkpoint of this run, None for another run's.
        """
        problems = verify_by_ranks(path, step, self._control)
        if problems:
            return None, problems
        try:
            state = self._load(path, excluded)
        except CheckpointException as error:
            return None, [describe_failure(error, self._folder, 0)]
        except DamagedCheckpoint as error:
            return None, [str(error)]
        if step is not None:
            self._store.verified.add(step)
        return state, []

    def _load(self, path: Path, excluded: frozenset[str]) -> dict[str, Any]:
        opened = open_by_ranks(path, self._control, self._needs)
        state = opened.state
        run_is_over = self._last_step is not None and state["step"] >= self._last_step
        if state["model_only"] and not run_is_over:
            raise ConfigError(
                f"{path} contains only the model (checkpoint.last_save_model_only): training cannot continue "
                "from it; set checkpoint.load_step to an earlier step, or checkpoint.folder to a new folder"
            )
        tensors: dict[str, Any] = {"model": get_model_state_dict(self._model)}
        optimizer_state: dict[str, Any] = {}
        if state["step"] > 0 and not state["model_only"] and "optimizer" not in excluded:
            optimizer_state = get_optimizer_state_dict(self._model, self._optimizer)
            tensors["optimizer"] = optimizer_state["state"]
        check_fit(opened.reader, tensors["model"])
        dcp.load(tensors, storage_reader=opened.reader, process_group=self._control)
        set_model_state_dict(self._model, tensors["model"])
        if optimizer_state:
            set_optimizer_state_dict(self._model, self._optimizer, optimizer_state)
        return exclude_parts({**state, "not_exact": restore_rng(opened)}, excluded)
