"""The trainer's own hooks that connect a part of octavo with the loop. `Trainer.__init__` lists their order.

Three more stand beside what they do: `Guard`, `DelayedScalingSteps` and `Checkpoints`.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from octavo.config.schema import Comm, Float8, Profiling, Validation
from octavo.core.logging import logger
from octavo.core.waiting import activity
from octavo.distributed import mesh
from octavo.distributed.ddp import reduce_gradients_now
from octavo.distributed.mesh import World
from octavo.metrics.float8_health import HealthReport, HealthRow, curves
from octavo.metrics.logger import MetricsLogger
from octavo.metrics.profiler import profiling
from octavo.train import quantization
from octavo.train.hooks import Hook, StepRecord
from octavo.train.nonfinite_guard import Guard
from octavo.train.quantization import DelayedScalingSteps
from octavo.train.step import TrainStep
from octavo.train.validate import Validator
from octavo.train.watchdog import Watchdog


class MeasureHealth(Hook):
    """Measures the casts of float8 layers in the steps that are due, writes them and warns about bad ones."""

    def __init__(
        self,
        settings: Float8,
        folder: Path | None,
        step: TrainStep,
        metrics: MetricsLogger,
    ):
        self._settings, self._step, self._metrics = settings, step, metrics
        self._report = HealthReport(settings, folder)
        self._monitor = quantization.build_monitor(step.model, settings)
        self._measuring = ExitStack()

    def on_start(self, step: int) -> None:
        self._report.start(step)

    def before_step(self, step: int) -> None:
        if self._monitor is not None and self._report.due(step):
            self._measuring.enter_context(self._monitor.step())

    def after_backward(self, record: StepRecord) -> None:
        self._measuring.close()

    def before_update(self, record: StepRecord) -> None:
        if self._monitor is None or not self._report.due(record.step):
            return
        rows = self._monitor.table.rows
        self._report.write(record.step, rows)
        if self._metrics.tracks:
            self._metrics.track(record.step, curves(rows))
        self._report.judge(record.step, rows, lambda layer: self._try_recipes(layer, record))

    def _try_recipes(self, layer: str, record: StepRecord) -> tuple[Sequence[HealthRow], Sequence[str]]:
        """What other recipes would do to `layer`, tried on the step's first microbatch."""
        start, step = time.perf_counter(), self._step
        reduce_gradients_now(step.model, last=False)  # the trial computes no gradients to reduce
        with step.computing():
            result = quantization.try_recipes(
                step.model, layer, self._settings, lambda: step.loss(*record.batches[0]) / step.global_tokens
            )
        self._metrics.pause(time.perf_counter() - start)
        step.progress()
        return result


class ReportMetrics(Hook):
    """Counts steps, and reports those that are due, the last, and those that the guard has judged bad."""

    def __init__(
        self,
        metrics: MetricsLogger,
        world: World,
        guard: Guard,
        scales: DelayedScalingSteps,
        last_step: int,
    ):
        self._metrics, self._world, self._guard, self._scales = metrics, world, guard, scales
        self._last_step = last_step

    def on_start(self, step: int) -> None:
        self._metrics.start(step)

    def after_step(self, record: StepRecord) -> None:
        tokens = sum(tokens_BS.numel() // self._world.tokens_shared for tokens_BS, _ in record.batches)
        self._metrics.add_batch(tokens, record.data_seconds)
        self._metrics.end_step()
        ends = record.step == self._last_step or record.stops
        if self._metrics.due(record.step) or record.verdict.reason or ends:
            self._metrics.report(
                step=record.step,
                loss=record.loss,
                loss_max=self._world.largest_mean(record.local_loss),
                grad_norm=record.grad_norm,
                lr=record.lr,
                tokens=record.tokens_seen,
                counts={**self._guard.counts(), **self._scales.take_counts()},
            )

    def on_end(self) -> None:
        self._metrics.close()


class LimitStepTime(Hook):
    """Lets the watchdog time every step: the first, which may compile, with a timeout of its own."""

    def __init__(self, watchdog: Watchdog, comm: Comm):
        self._watchdog, self._comm = watchdog, comm
        self._seconds = self._next = comm.init_timeout_seconds

    def before_step(self, step: int) -> None:
        if self._seconds != self._next:
            self._seconds = self._next
            mesh.set_timeout(self._seconds)
        self._watchdog.begin(step, self._seconds)

    def after_step(self, record: StepRecord) -> None:
        self._watchdog.pause()  # a validation or a save may be slow
        if not record.abandoned:
            self._next = self._comm.train_timeout_seconds


class TellActivity(Hook):
    """Tells `core/waiting.py` what the process does, and that a first step compiles."""

    def __init__(self, *, compiles: bool):
        self._compiles = compiles

    def before_step(self, step: int) -> None:
        if self._compiles:
            minutes = "usually one to five minutes, less if this job was compiled before"
            logger.info("Step %d compiles the model: %s", step, minutes)
        activity.begin(f"step {step}{', which compiles the model' if self._compiles else ''}")
        self._compiles = False

    def after_step(self, record: StepRecord) -> None:
        activity.begin(f"what follows step {record.step}: validation, checkpoints")


class Validate(Hook):
    """Measures the loss on held-out text after the steps that are due, unless the run is asked to stop."""

    def __init__(
        self,
        settings: Validation,
        validator: Validator | None,
        step: TrainStep,
        metrics: MetricsLogger,
        last_step: int,
    ):
        self._validator, self._step, self._metrics = validator, step, metrics
        self._freq, self._last_step = settings.freq, last_step

    def after_step(self, record: StepRecord) -> None:
        if self._validator is None or record.abandoned or record.stops:
            return
        if record.step % self._freq == 0 or record.step == self._last_step:
            self._metrics.report_validation(record.step, self._validator.run(self._step))


class Profile(Hook):
    """Writes traces and memory snapshots of the steps that are due."""

    def __init__(self, settings: Profiling, folder: Path, rank: int):
        self._args = settings, folder, rank
        self._scope = ExitStack()
        self._end_step: Callable[[], None] | None = None

    def before_step(self, step: int) -> None:
        if self._end_step is None:
            self._end_step = self._scope.enter_context(profiling(*self._args))

    def after_step(self, record: StepRecord) -> None:
        if self._end_step is not None and not record.abandoned:
            self._end_step()

    def on_end(self) -> None:
        self._scope.close()
