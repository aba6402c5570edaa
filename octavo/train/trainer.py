"""The trainer: from a config to a trained model. Read `main` first, then `Trainer.__init__` and
`Trainer.steps`.

Run it by `./run_train.sh`, by `octavo train`, or by `torchrun … -m octavo.train --job.config_file …`.

Results do not depend on the number of processes. Initial weights depend only on the seed and the parameters'
names (`models/init.py`), step s consumes the global samples [(s - 1) G, s G), where G is the global batch
size (`data/dataloader.py`), and gradients are summed over all of them (`step.py`).
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext

import torch
from torch import Tensor, nn

from octavo import config, models, preflight
from octavo.config import JobConfig
from octavo.core.logging import init_logger, logger
from octavo.core.waiting import activity, reminders
from octavo.data.corpus_files import BadRecords
from octavo.distributed import mesh
from octavo.hf.training_io import export_final, open_initial_weights
from octavo.metrics.device import choose_param_dtype, fastest_attention, pick_device
from octavo.metrics.logger import build_metrics
from octavo.models.init import set_determinism
from octavo.optim.lr_schedule import lr_factor, schedule_of, set_lr
from octavo.optim.optimizer import build_optimizer, clip_gradients
from octavo.tokenizer import build_tokenizer
from octavo.train import quantization
from octavo.train.balance_experts import BalanceExperts
from octavo.train.build_data import build_data
from octavo.train.build_model import build_model, model_args, pipeline_plan
from octavo.train.builtin_hooks import (
    LimitStepTime,
    MeasureHealth,
    Profile,
    ReportMetrics,
    TellActivity,
    Validate,
)
from octavo.train.changed_job import JobIdentity
from octavo.train.checkpoints import Checkpoints, Progress
from octavo.train.exit import exit_code_of
from octavo.train.garbage_collection import GarbageCollector
from octavo.train.hooks import GuardAction, Hooks, StepRecord, make_registered
from octavo.train.memory_check import require_memory
from octavo.train.nan_locator import first_non_finite
from octavo.train.nonfinite_guard import BadNumbers, Guard
from octavo.train.run_dir import RunFolder
from octavo.train.run_record import RecordRun, log_results
from octavo.train.signals import Signals
from octavo.train.step import build_train_step
from octavo.train.validate import build_validator
from octavo.train.watchdog import Watchdog


class Trainer:
    """One process of a job. The constructor builds all components in the order of their dependencies.

    For hooks: job, the whole configuration. folder: of the run. world: this process's place. tokenizer, data:
    of the training text. model_args, model: this process's part of the model and the arguments of the whole.
    train_step: forward and backward. optimizer. metrics: also takes values for the trackers. guard: its
    counts. checkpoints: saves on demand. progress: steps done and tokens seen.
    """

    def __init__(self, job: JobConfig, signals: Signals | None = None, watchdog: Watchdog | None = None):
        self.job, self.signals = job, signals or Signals()
        watchdog = watchdog or Watchdog()
        logger.info("Starting job: %s", job.job.description)
        if job.job.print_config:
            logger.info("Running with config: %s", job.to_dict())
        for note in preflight.notes(job):
            logger.info(note)
        self.folder = RunFolder(job.job.dump_folder, lock=os.environ.get("RANK", "0") == "0")
        models.import_custom(job.experimental.custom_import, job.model.name)

        device = pick_device()
        set_determinism(job.training.seed, deterministic=job.training.deterministic)
        dtype = choose_param_dtype(job.training.mixed_precision_param, device)
        self.world = world = mesh.init_world(device, job.parallelism, job.comm)

        self.tokenizer = build_tokenizer(job.model.hf_assets_path)
        self.model_args = model_args(job, self.tokenizer)  # before the data, so that errors come early
        plan = pipeline_plan(job, self.model_args)
        require_memory(job, self.model_args, plan, world=world, device=device)
        initial = open_initial_weights(
            job.checkpoint, self.folder.path / job.checkpoint.folder, job.model, self.model_args
        )
        self.bad_records = bad = BadRecords(job.training.max_bad_records)
        self.data = build_data(job, self.tokenizer, world=world, device=device, bad=bad)
        validator = build_validator(
            job, self.tokenizer, self.data.source, world=world, device=device, bad=bad
        )
        logger.info("Data: %s", self.data.source.description)
        if validator is not None:
            logger.info("Validation: %s", validator.description)

        recipe = quantization.recipe_name(job.model.converters, job.float8)
        built = build_model(
            job, self.model_args, recipe, device=device, param_dtype=dtype, world=world, pipeline=plan
        )
        self.train_step = build_train_step(
            job, built, plan=plan, world=world, device=device, progress=watchdog.progress
        )
        scales = quantization.build_delayed_scaling(self.model, recipe, job.float8, device)
        self.optimizer = build_optimizer(self.model, job.optimizer)

        self.metrics = build_metrics(
            job,
            self.folder.path,
            rank=world.rank,
            device=device,
            work=built.work,
            epoch_samples=getattr(self.data.source, "samples", None),
        )
        self.guard = Guard(job.fault_tolerance)
        self.checkpoints = Checkpoints(
            job,
            self.folder,
            self.model,
            self.optimizer,
            world=world,
            data=self.data,
            guard=self.guard,
            scales=scales,
            metrics=self.metrics,
            initial=initial,
            identity=JobIdentity(
                job=job,
                layout=world.layout,
                data=self.data.source.identity,
                tokenizer=self.tokenizer.fingerprint,
                precision=str(dtype).removeprefix("torch."),
                schedule=schedule_of(job.optimizer, job.lr_scheduler, job.training.steps),
            ),
        )
        self.progress = Progress(0, 0)
        writes = self.folder.path if world.rank == 0 else None
        self.hooks = Hooks(
            [
                RecordRun(job, writes, device=device, processes=world.size, recipe=recipe, dtype=dtype),
                GarbageCollector(job.training.gc_freq),
                self.guard,
                MeasureHealth(job.float8, writes, self.train_step, self.metrics),
                scales,
                BalanceExperts(
                    self.model, world, self.metrics, writes, global_tokens=self.train_step.global_tokens
                ),
                ReportMetrics(self.metrics, world, self.guard, scales, job.training.steps),
                LimitStepTime(watchdog, job.comm),
                TellActivity(compiles=job.compile.enable),
                Validate(job.validation, validator, self.train_step, self.metrics, job.training.steps),
                self.checkpoints,
                Profile(job.profiling, self.folder.path, world.rank),
                *make_registered(self),
            ]
        )
        logger.info(
            "Trainer is initialized with local batch size %d, global batch size %d, "
            "gradient accumulation steps %d, sequence length %d, total steps %d (warmup %d)",
            job.training.local_batch_size,
            self.train_step.global_tokens // job.training.seq_len,
            self.train_step.microbatches,
            job.training.seq_len,
            job.training.steps,
            job.lr_scheduler.warmup_steps,
        )

    @property
    def model(self) -> nn.Module:
        """This process's part of the model."""
        return self.train_step.model

    def train(self) -> None:
        """Run the remaining steps, and log where the results are."""
        if self.job.checkpoint.create_seed_checkpoint:
            with closing(self.data), closing(self.metrics):
                self.checkpoints.save_seed()
            return
        for _ in self.steps():
            pass
        if self.bad_records.found:
            logger.warning("Data: %s", self.bad_records.summary())
        if summary := self.metrics.summary():
            logger.info("%s", summary)
        logger.info("Training completed")
        if self.world.rank == 0:
            log_results(self.folder.path, self.job)

    def steps(self) -> Iterator[int]:
        """Run the remaining steps, yielding the number of each when it is done."""
        self.progress = self.checkpoints.resume()
        began, last = self.progress.step, self.job.training.steps
        with closing(self.data), self.hooks.running(began), fastest_attention():
            if began < last:
                logger.info("Training starts at step %d.", began + 1)
            else:
                logger.info("All %d steps of this run are done; raise training.steps to continue", began)
            if self.world.sum(torch.tensor(self.signals.asked, device=self.train_step.device)):
                self.checkpoints.stop(self.progress, self.signals, began=began)
            while self.progress.step < last:
                record = self._step(self.progress.step + 1)
                match record.verdict.action:
                    case GuardAction.STOP:
                        raise BadNumbers(self._diagnosis(record))
                    case GuardAction.REWIND:
                        self.progress = self.checkpoints.rewind(record)
                        self.hooks.on_start(self.progress.step)
                        continue
                yield record.step
                if record.stops and record.step < last:
                    self.checkpoints.stop(self.progress, self.signals, began=began)
            self.checkpoints.saver.wait()
            if self.job.checkpoint.last_save_in_hf:
                self._export(last)

    def _step(self, number: int) -> StepRecord:
        """Run one optimizer step: read its batches, compute gradients, clip, judge, update."""
        job = self.job
        self.hooks.before_step(number)
        lr = job.optimizer.lr * lr_factor(number, job.training.steps, job.lr_scheduler)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad()

        record = StepRecord(number, lr)
        record.local_loss = self.train_step.gradients(self._read_batches(record))
        self.hooks.after_backward(record)
        norm = clip_gradients(self.model, job.training.max_norm, self.world.pipeline)
        # The only place where the host waits for the device: the guard needs the numbers before the update.
        asked = record.local_loss.new_tensor(self.signals.asked)
        sums = self.world.sum(torch.stack([record.local_loss, asked]))
        record.loss, record.stops, record.grad_norm = torch.cat([sums, norm.to(sums).view(1)]).tolist()
        self.hooks.before_update(record)
        if record.verdict.action is GuardAction.UPDATE:
            self.optimizer.step()
            quantization.after_optimizer_step(self.model, job.float8)
        self.progress = Progress(number, self.progress.tokens_seen + self.train_step.global_tokens)
        record.tokens_seen = self.progress.tokens_seen
        self.hooks.after_step(record)
        return record

    def _read_batches(self, record: StepRecord) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the microbatches of a step, on the device, and keep them in `record` in case the step must be
        run again.
        """
        device = self.train_step.device
        for _ in range(self.train_step.microbatches):
            start = time.perf_counter()
            tokens_BS, labels_BS = self.data.next_batch()
            record.data_seconds += time.perf_counter() - start
            labels_BS = self.world.local_labels(labels_BS)
            batch = tokens_BS.to(device, non_blocking=True), labels_BS.to(device, non_blocking=True)
            record.batches.append(batch)
            yield batch

    def _diagnosis(self, record: StepRecord) -> str:
        """The message about a step that stops the run."""
        message = f"Step {record.step}: stopped before the update: {record.verdict.reason}"
        if record.verdict.non_finite:
            self.optimizer.zero_grad()

            def rerun(check: Callable[[Tensor], None]) -> None:
                self.train_step.gradients(record.batches, check)

            message += f"; {first_non_finite(self.model, rerun)}"
        return (
            f"{message}. Rerunning the same command fails again: lower optimizer.lr, or skip the step with "
            "--fault_tolerance.non_finite=skip or rewind"
        )

    def _export(self, step: int) -> None:
        """Export the trained model in Hugging Face's format, unless an earlier run of this job did."""
        settings = self.job.checkpoint
        mesh.set_timeout(self.job.comm.init_timeout_seconds)  # the others wait while one writes
        checkpoints, spec = self.folder.path / settings.folder, models.get(self.job.model.name)
        whole = spec, self.model_args, self.tokenizer
        export_final(
            self.model, checkpoints, step, settings.export_dtype, *whole, pipeline=self.world.pipeline
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `argv` (default: the command line) says; returns the exit code (see `exit_codes`)."""
    init_logger()

    def train(signals: Signals, watchdog: Watchdog) -> None:
        job = config.load(sys.argv[1:] if argv is None else argv)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        preflight.check(job, world_size=world_size, gpus=torch.cuda.device_count())
        signals.saves = job.checkpoint.enable and not job.checkpoint.load_only
        with reminders() if os.environ.get("RANK", "0") == "0" else nullcontext():
            activity.begin("the data, the model and its first weights")
            with signals.starting():
                trainer = Trainer(job, signals, watchdog)
            trainer.train()

    return exit_code_of(train)
