"""The checkpoints of a run: what they hold besides tensors, when they are saved, and how a run continues from
one. `octavo/checkpoint` writes, verifies and reads them.
"""

import platform
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import nn

import octavo
from octavo.checkpoint.checkpointer import Checkpointer
from octavo.checkpoint.loading import resume_message
from octavo.config import ConfigError, JobConfig
from octavo.core.logging import logger
from octavo.data.dataloader import DataLoader, merge_state_dicts
from octavo.distributed.mesh import World
from octavo.hf.training_io import InitialWeights
from octavo.metrics.logger import MetricsLogger
from octavo.train.changed_job import JobIdentity, changes, other_run
from octavo.train.hooks import Hook, StepRecord
from octavo.train.nonfinite_guard import BadNumbers, Guard
from octavo.train.quantization import DelayedScalingSteps
from octavo.train.run_dir import RunFolder
from octavo.train.signals import Signals, Stopped


class Progress(NamedTuple):
    """How far a run is: steps done, and tokens seen by all processes."""

    step: int
    tokens_seen: int


class Checkpoints(Hook):
    """Saves the run after the steps that are due.

    saver: writes and reads checkpoints of the run's model and optimizer. initial: weights to start from if
    there is no checkpoint.
    """

    def __init__(
        self,
        job: JobConfig,
        folder: RunFolder,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        world: World,
        data: DataLoader,
        guard: Guard,
        scales: DelayedScalingSteps,
        metrics: MetricsLogger,
        initial: InitialWeights | None,
        identity: JobIdentity,
    ):
        self._job, self._world, self._model, self._data = job, world, model, data
        self._guard, self._scales, self._metrics, self._initial = guard, scales, metrics, initial
        self._last_step, self._identity = job.training.steps, identity
        self._folder = folder.path / job.checkpoint.folder
        self.saver = Checkpointer(
            job.checkpoint, self._folder, model, optimizer, needs=("tokens_seen", "data", "schedule")
        )

    def after_step(self, record: StepRecord) -> None:
        if record.abandoned:
            return
        if self.saver.due(record.step, self._last_step):
            self.save(Progress(record.step, record.tokens_seen))
        self.saver.poll()
        self._guard.saved(self.saver.last_saved)
        self._metrics.add_saving(self.saver.take_paused_seconds())

    def save(self, progress: Progress) -> None:
        """Save the run as it is; a collective call."""
        self.saver.save(progress.step, self._last_step, self.state_dict(progress.tokens_seen))

    def state_dict(self, tokens_seen: int) -> dict[str, Any]:
        """The non-tensor state of a checkpoint; the same on every process, and a collective call."""
        data_states: list[Any] = [None] * self._world.size
        dist.all_gather_object(data_states, self._data.state_dict())
        return {
            "octavo": octavo.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "config": self._job.to_dict(),
            "layout": self._world.layout.degrees,
            "tokens_seen": tokens_seen,
            "data": merge_state_dicts(data_states),
            **self._identity.facts(),
            "guard": self._guard.state_dict(),
            "scales": self._scales.state_dict(),
        }

    def resume(self) -> Progress:
        """Continue from a checkpoint or from initial weights, if there are any.

        Raises `ConfigError` if the checkpoint is of another run.
        """
        state = self.saver.load(self._last_step)
        if state is not None:
            self._refuse_other_run(state)
        else:
            state = self._load_initial()
        if state is None:
            return Progress(0, 0)
        changed = [*other_run(state, self._identity), *changes(state, self._identity)]
        data = self._data.load_state_dict(state["data"]) if "data" in state else "it starts anew"
        progress = Progress(int(state["step"]), state["tokens_seen"])
        not_exact = {"data position": data, **state["not_exact"]}
        if "guard" in state:
            self._guard.load_state_dict(state["guard"])
        not_exact |= self._scales.load_state_dict(state.get("scales"))
        logger.info("%s", resume_message(*progress, not_exact))
        for change in changed:
            logger.warning("Changed since the checkpoint: %s", change)
        return progress

    def _refuse_other_run(self, state: Mapping[str, Any]) -> None:
        found = other_run(state, self._identity)
        if found and not self._job.checkpoint.allow_changed:
            raise ConfigError(
                f"{self._folder} is of another run: {'; '.join(map(str, found))}. To start anew, choose "
                "another job.dump_folder; to continue all the same, add --checkpoint.allow_changed"
            )

    def _load_initial(self) -> dict[str, Any] | None:
        """Load the initial weights that the job names, if any. Returns the state of the other run if the job
        loads all of it, else None.
        """
        if self._initial is None:
            return None
        if not self._job.checkpoint.initial_load_model_only:
            return self.saver.load_initial(self._initial.folder)
        self._initial.load(self._model)
        return None

    def rewind(self, record: StepRecord) -> Progress:
        """Load the last checkpoint, but keep the data position."""
        reason = record.verdict.reason
        state = self.saver.load()
        if state is None:
            raise BadNumbers(f"Step {record.step}: {reason}, and there is no checkpoint yet to go back to")
        progress = Progress(int(state["step"]), state["tokens_seen"])
        self._guard.rewound(state["guard"])
        self._scales.load_state_dict(state.get("scales"))
        logger.warning(
            "Step %d: %s. Rewound to the checkpoint of step %d; the data continues after step %d, so the "
            "batches in between are skipped",
            *(record.step, reason, progress.step, record.step),
        )
        return progress

    def stop(self, progress: Progress, signals: Signals, *, began: int) -> NoReturn:
        """Save, unless that is done or the run `began` with this step, and raise `Stopped`; a collective
        call.
        """
        step, settings = progress.step, self._job.checkpoint
        saves = settings.enable and not settings.load_only
        self.saver.wait()
        if saves and self.saver.last_saved != step > began:
            self.save(progress)
            self.saver.wait()
        saved = self.saver.last_saved if step > began else step
        raise Stopped.after(step, signals.gather(), saves=saves, saved=saved)

    def save_seed(self) -> None:
        """Save step 0, from which runs on any number of processes can start."""
        if self.resume().step or self.saver.found_checkpoints:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint = true: {self._folder} holds checkpoints; name another "
                "folder, or leave it out"
            )
        self.save(Progress(0, 0))
        self.saver.wait()
        if self.saver.last_saved is None:
            raise ConfigError(f"{self._folder}: the seed checkpoint was not saved")
