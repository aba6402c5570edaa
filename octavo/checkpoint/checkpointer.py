"""What the trainer calls: when to save, saving, and going on from what was saved.

    <folder>/step-20/                a checkpoint: DCP's shards and .metadata, tensors only
    <folder>/step-20/state.json      what is not a tensor: step, tokens, data position, config, versions
    <folder>/step-20/manifest.json   sizes and hashes of all files; see `manifest.py`

Tensors go by their plain parameter names, so a checkpoint does not depend on compile, activation
checkpointing, float8 or the number of processes. `store.py` has the protocol that makes a checkpoint whole or
absent, `saving.py` one save, `loading.py` what the ranks do together to load, `reader.py` how a checkpoint is
read without running anything of it.

An asynchronous save copies the tensors and does the rest, by the same code, in a thread with a process group
of its own, so that its collectives and training's never wait for each other.
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

from octavo.checkpoint import disk_space, failpoints, rng
from octavo.checkpoint.checkpoint_errors import DamagedCheckpoint, SavesFailed
from octavo.checkpoint.loading import check_fit, open_by_ranks, problems_by_ranks, restore_rng
from octavo.checkpoint.resume import without
from octavo.checkpoint.saving import Outcome, Pending, Save, from_rank_0, write
from octavo.checkpoint.store import Store, none_verifies, path_of, published, told
from octavo.config import ConfigError
from octavo.config.schema import Checkpoint
from octavo.core.logging import logger
from octavo.distributed.mesh import disk_group


class Checkpointer:
    """Saves `model` and `optimizer` into `folder` and loads them back.

    What else a run needs is passed as `state`, a dict that JSON can hold, the same on every process. A
    checkpoint whose state lacks one of `needs` does not verify.
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
        self._model = model
        self._optimizer = optimizer
        self._store = Store(folder, keep=settings.keep_latest_k, algorithm=settings.hash)
        self._stagers: dict[str, BlockingAsyncStager] = {}
        self._pending: Pending | None = None
        self._failed = 0
        self._lost = 0.0
        self._entered = 0.0
        self._last_step: int | None = None
        self.last_saved: int | None = None
        """The step that was published last by this process, None before the first."""
        self.found = False
        """Whether `load` found checkpoints in the folder."""
        if dist.is_initialized():
            self._control = disk_group()
            self._writing = disk_group()

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` ends with a save: at the interval, and at the end of the run."""
        saves = self._settings.enable and not self._settings.load_only
        return saves and (step % self._settings.interval == 0 or step == last_step)

    def save(self, step: int, last_step: int, state: dict[str, Any]) -> None:
        """Write step `step`. An asynchronous one returns when the tensors are copied; see `poll`.

        Raises `SavesFailed` after `checkpoint.max_failed_saves` failures in a row, or if the last step's save
        failed. A failure before that is logged.
        """
        with self._losing_time():
            self._await_pending()
            save = self._collect(step, last_step, state)
            final = step == last_step
            if self._settings.async_mode == "disabled":
                self._conclude(step, final, write(save, self._store, self._writing))
            else:
                staged = self._staged(save)
                seconds = time.perf_counter() - self._entered
                self._pending = Pending(staged, final, seconds, self._store, self._writing)

    def poll(self) -> None:
        """Conclude an asynchronous save if it is through on every process. Raises as `save` does."""
        if self._pending is None:
            return
        with self._losing_time():
            done = torch.tensor(int(self._pending.done()))
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._control)
            if done.item():
                self._await_pending()

    def wait(self) -> None:
        """Finish a save that is under way. Raises as `save` does."""
        if self._pending is None:
            return
        with self._losing_time():
            self._await_pending()

    def take_lost_seconds(self) -> float:
        """The seconds that training stood still for saves since this was last asked."""
        lost, self._lost = self._lost, 0.0
        return lost

    @contextmanager
    def _losing_time(self) -> Iterator[None]:
        self._entered = time.perf_counter()
        try:
            yield
        finally:
            self._lost += time.perf_counter() - self._entered

    def _collect(self, step: int, last_step: int, state: dict[str, Any]) -> Save:
        model_only = step == last_step and self._settings.last_save_model_only
        tensors: dict[str, Any] = {"model": get_model_state_dict(self._model)}
        if not model_only:
            if step > 0:  # before its first step an optimizer has no state, and asking would make it some
                tensors["optimizer"] = get_optimizer_state_dict(self._model, self._optimizer)["state"]
            tensors["rng"] = {str(dist.get_rank()): rng.capture()}
        state = {"step": step, "model_only": model_only, "world_size": dist.get_world_size(), **state}
        return Save(step, tensors, state)

    def _staged(self, save: Save) -> Save:
        pinned = self._settings.async_mode == "async_with_pinned_mem"
        staged = {}
        for part, tensors in save.tensors.items():
            stager = self._stagers.setdefault(part, BlockingAsyncStager(cache_staged_state_dict=pinned))
            staged[part] = stager.stage(tensors)
            failpoints.reach("during staging")
        return Save(save.step, staged, save.state)

    def _await_pending(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._conclude(pending.step, pending.final, pending.outcome(), pending.lost)

    def _conclude(self, step: int, final: bool, outcome: Outcome, lost: float = 0.0) -> None:
        """Tell how a save ended, and count failures; the same on every rank.

        `lost`: seconds that training stood still for it in earlier calls.
        """
        path = path_of(self._folder, step)
        if outcome.problem is None:
            self._failed, self.last_saved = 0, step
            if dist.get_rank() == 0:
                logger.info(
                    "Saved checkpoint %s: %s in %.2f s, for which training stood still %.2f s",
                    path,
                    disk_space.size(outcome.bytes),
                    outcome.seconds,
                    lost + time.perf_counter() - self._entered,
                )
                for note in outcome.notes:
                    logger.info("Checkpoints: %s", note)
            return
        self._failed += 1
        limit = self._settings.max_failed_saves
        message = f"{path} was not saved: {outcome.problem}"
        if final:
            raise SavesFailed(
                f"{message}. It was the last of this run; the steps since the one before are lost"
            )
        if self._failed >= limit:
            raise SavesFailed(
                f"{message}. That is failure {self._failed} in a row (checkpoint.max_failed_saves)"
            )
        if dist.get_rank() == 0:
            logger.warning(
                "%s. Training goes on; %d more in a row end the run (checkpoint.max_failed_saves = %d)",
                message,
                limit - self._failed,
                limit,
            )

    def load(self, last_step: int | None = None) -> dict[str, Any] | None:
        """Go on from `checkpoint.load_step`, or where it is -1 from the newest step that verifies. A run that
        has saved since goes back to what it saved last.

        Model, optimizer and random numbers are set in place. Returns the state that was saved, with
        "not_exact": what of this process is not as it was then, and why. None where there is no checkpoint,
        or `checkpoint.enable` is false. A checkpoint of the model alone will do for a run that is over, with
        `last_step` done.

        Raises:
            NoCheckpointVerifies: there are checkpoints, and none can be relied on.
            ConfigError: the step asked for is not there, does not verify, cannot be continued, or does not
                fit the model.
        """
        if not self._settings.enable:
            return None
        self.wait()
        self._last_step = last_step
        steps = from_rank_0(self._look(), self._control)
        self.found = bool(steps)
        wanted = self._settings.load_step
        if wanted >= 0 and self.last_saved is not None:  # this run has gone on from there
            wanted = self.last_saved
        if wanted >= 0:
            return self._load_step(
                wanted, steps, self._excluded() if self.last_saved is None else frozenset()
            )
        wrong: dict[int, list[str]] = {}
        for step in reversed(steps):
            state, wrong[step] = self._try(path_of(self._folder, step), step)
            if state is not None:
                return state
            if dist.get_rank() == 0:
                logger.warning(
                    "%s does not verify and is passed over: %s",
                    path_of(self._folder, step),
                    told(wrong[step]),
                )
        if wrong:
            raise none_verifies(self._folder, wrong)
        return None

    def _look(self) -> list[int]:
        """On rank 0: clean up after an ended run; the steps that are there."""
        if dist.get_rank() != 0:
            return []
        for name in self._store.clean():
            logger.info("Removed %s, which an earlier run left unfinished", self._folder / name)
        return published(self._folder)

    def load_initial(self, path: Path) -> dict[str, Any]:
        """Go on from the checkpoint in `path`, of another run, but for `checkpoint.exclude_from_loading`; see
        `load`.
        """
        state, wrong = self._try(path, None, self._excluded())
        if state is None:
            raise DamagedCheckpoint(f"checkpoint.initial_load_path: {path} does not verify: {told(wrong)}")
        return state

    def _excluded(self) -> frozenset[str]:
        return frozenset(self._settings.exclude_from_loading)

    def _load_step(self, step: int, steps: list[int], excluded: frozenset[str]) -> dict[str, Any]:
        if step not in steps:
            raise ConfigError(f"checkpoint.load_step = {step}: {self._folder} has steps {steps}")
        state, wrong = self._try(path_of(self._folder, step), step, excluded)
        if state is None:
            raise DamagedCheckpoint(
                f"checkpoint.load_step = {step}: {path_of(self._folder, step)} does not verify: {told(wrong)}"
            )
        return state

    def _try(
        self, path: Path, step: int | None, excluded: frozenset[str] = frozenset()
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Load a checkpoint if it verifies; else what is wrong with it. The same on every rank. `step`: of
        this run's own.
        """
        wrong = problems_by_ranks(path, step, self._control)
        if wrong:
            return None, wrong
        try:
            state = self._load(path, excluded)
        except CheckpointException as error:
            return None, [disk_space.why(error, self._folder, 0)]
        except DamagedCheckpoint as error:
            return None, [str(error)]
        if step is not None:
            self._store.good.add(step)
        return state, []

    def _load(self, path: Path, excluded: frozenset[str]) -> dict[str, Any]:
        opened = open_by_ranks(path, self._control, self._needs)
        state = opened.state
        over = self._last_step is not None and state["step"] >= self._last_step
        if state["model_only"] and not over:
            raise ConfigError(
                f"{path} holds the model only (checkpoint.last_save_model_only): training cannot go on "
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
        return without({**state, "not_exact": restore_rng(opened)}, excluded)
