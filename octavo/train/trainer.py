"""The trainer: from a config to a trained model. Read `main` first, then `Trainer.__init__` and
`Trainer.train`.

Run it by `./run_train.sh`, by `octavo train`, or by `torchrun … -m octavo.train --job.config_file …`.

Results do not depend on the number of processes. Initial weights depend only on the seed and the parameters'
names (`models/init.py`), and step s consumes the global samples [(s - 1) G, s G), where G is the global batch
size (`data/dataloader.py`). The loss of a microbatch is its sum over tokens divided by the number of tokens
in the global batch, so gradients of all microbatches and processes are summed.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import octavo
from octavo import config, models
from octavo.checkpoint.checkpointer import Checkpointer
from octavo.checkpoint.loading import resume_message
from octavo.config import ConfigError, JobConfig
from octavo.config.pipeline_plan import PipelinePlan
from octavo.core.logging import init_logger, logger, wants_color
from octavo.data.build import build_source
from octavo.data.corpus_files import BadRecords
from octavo.data.dataloader import DataLoader, merge_state_dicts
from octavo.data.sample_source import SourceOptions
from octavo.distributed import mesh
from octavo.distributed.ddp import reduce_gradients_now
from octavo.distributed.mixed_precision import computing_in_copies
from octavo.distributed.pipeline_parallel import Activations, Pipeline
from octavo.distributed.tensor_parallel import loss_context
from octavo.hf.training_io import export_final, final_export_folder, open_initial_weights
from octavo.metrics.device import choose_param_dtype, fastest_attention, peak_flops, pick_device
from octavo.metrics.float8_health import HealthReport, HealthRow, curves
from octavo.metrics.logger import MetricsLogger
from octavo.metrics.profiler import profiling
from octavo.models.init import set_determinism
from octavo.optim.lr_schedule import lr_factor, schedule_of, set_lr
from octavo.optim.optimizer import build_optimizer, clip_gradients
from octavo.tokenizer import build_tokenizer
from octavo.train import quantization
from octavo.train.build_model import build_model, model_args, pipeline_plan
from octavo.train.exit import exit_code_of
from octavo.train.garbage_collection import GarbageCollector
from octavo.train.nan_locator import first_non_finite
from octavo.train.nonfinite_guard import BadNumbers, Guard, GuardAction, StepVerdict
from octavo.train.run_dir import RunFolder
from octavo.train.run_record import log_results, write_run_record
from octavo.train.signals import Signals, Stopped
from octavo.train.validate import build_validator
from octavo.train.watchdog import Watchdog


def loss_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross entropy in float32, summed over the tokens; a scalar. Logits may be sharded by vocabulary."""
    loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="sum")
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


class Trainer:
    """One process of a job. The constructor builds all components in the order of their dependencies."""

    def __init__(self, job: JobConfig, signals: Signals | None = None, watchdog: Watchdog | None = None):
        self.job = job
        self.signals, self.watchdog = signals or Signals(), watchdog or Watchdog()
        logger.info("Starting job: %s", job.job.description)
        if job.job.print_config:
            logger.info("Running with config: %s", job.to_dict())
        for note in config.notes(job):
            logger.info(note)
        self.folder = RunFolder(job.job.dump_folder, lock=os.environ.get("RANK", "0") == "0")
        models.import_custom(job.experimental.custom_import, job.model.name)

        self.device = pick_device()
        set_determinism(job.training.seed, deterministic=job.training.deterministic)
        self.param_dtype = choose_param_dtype(job.training.mixed_precision_param, self.device)
        self.world = mesh.init_world(self.device, job.parallelism, job.comm)

        tokenizer = self.tokenizer = build_tokenizer(job.model.hf_assets_path)
        self.model_args = model_args(job, tokenizer)  # before the data, so that errors come early
        plan = pipeline_plan(job, self.model_args)
        self.initial = open_initial_weights(
            job.checkpoint, self.folder.path / job.checkpoint.folder, job.model, self.model_args
        )
        self.bad_records = BadRecords(job.training.max_bad_records)
        data_rank, data_ranks = self.world.data_rank, self.world.layout.data
        options = SourceOptions(
            tokenizer=tokenizer,
            seq_len=job.training.seq_len,
            seed=job.training.seed if job.training.data_seed is None else job.training.data_seed,
            dataset_path=job.training.dataset_path,
            held_out_fraction=job.validation.fraction,
            bad=self.bad_records,
            verify=(data_rank, data_ranks) if job.training.verify_data else None,
        )
        self.data = DataLoader(
            build_source(job.training.dataset, options),
            local_batch_size=job.training.local_batch_size,
            dp_rank=data_rank,
            dp_degree=data_ranks,
            workers=job.training.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        self.validator = build_validator(
            job,
            tokenizer,
            self.data.source,
            world=self.world,
            device=self.device,
            bad=self.bad_records,
        )
        one_pass = job.training.local_batch_size * self.world.layout.data
        logger.info("Data: %s", self.data.source.description)
        if self.validator is not None:
            logger.info("Validation: %s", self.validator.description)
        self.global_batch_size = max(job.training.global_batch_size, one_pass)
        self.accumulation = self.global_batch_size // one_pass
        self.global_tokens = self.global_batch_size * job.training.seq_len

        self.recipe = quantization.recipe_name(job.model.converters, job.float8)
        self.model, work, stages = build_model(
            job,
            self.model_args,
            self.recipe,
            device=self.device,
            param_dtype=self.param_dtype,
            world=self.world,
            pipeline=plan,
        )
        self.pipeline = None if plan is None else self._pipeline(plan, stages)
        compile_loss = job.compile.enable and "loss" in job.compile.components
        self.chunked = job.training.loss_chunk_tokens is not None
        self.loss_sum: Callable[[Tensor, Tensor], Tensor] = loss_sum
        if self.chunked:  # `_logits` returns the tokens, since the full logits never exist
            self.loss_sum = lambda tokens, labels: self.model(tokens, labels_BS=labels)
        elif compile_loss:
            self.loss_sum = torch.compile(loss_sum)
        self.scales = quantization.build_delayed_scaling(self.model, self.recipe, job.float8, self.device)
        self.optimizer = build_optimizer(self.model, job.optimizer)
        self.schedule = schedule_of(job.optimizer, job.lr_scheduler, job.training.steps)

        self.checkpointer = Checkpointer(
            job.checkpoint,
            self.folder.path / job.checkpoint.folder,
            self.model,
            self.optimizer,
            needs=("tokens_seen", "data", "schedule"),
        )
        peak = peak_flops(self.device)
        logger.info(
            "Peak FLOPS used for computing MFU: %s (%s)",
            "none" if peak.flops is None else f"{peak.flops:.3e}",
            peak.source,
        )
        self.metrics = MetricsLogger(
            job.metrics,
            self.folder.path,
            rank=self.world.rank,
            device=self.device,
            work=work,
            peak=peak,
            color=wants_color(),
            config=job.to_dict(),
            description=job.job.description,
        )
        self.health = HealthReport(job.float8, self.folder.path if self.world.rank == 0 else None)
        self.monitor = quantization.build_monitor(self.model, job.float8)
        self.guard = Guard(job.fault_tolerance)
        self.tokens_seen = 0
        logger.info(
            "Trainer is initialized with local batch size %d, global batch size %d, "
            "gradient accumulation steps %d, sequence length %d, total steps %d (warmup %d)",
            job.training.local_batch_size,
            self.global_batch_size,
            self.accumulation,
            job.training.seq_len,
            job.training.steps,
            job.lr_scheduler.warmup_steps,
        )

    def _pipeline(self, plan: PipelinePlan, stages: Sequence[nn.Module]) -> Pipeline:
        """The pipeline of this process's stages."""
        spec, layout, training = models.get(self.job.model.name), self.world.layout, self.job.training
        assert spec.pipeline is not None
        assert self.world.pipeline is not None
        return Pipeline(
            stages,
            plan,
            self.world.pipeline,
            Activations(
                spec.pipeline.width(self.model_args), layout.context * layout.tensor, self.param_dtype
            ),
            tokens_shape=(training.local_batch_size, training.seq_len),
            device=self.device,
            progress=self.watchdog.progress,
        )

    def train(self) -> None:
        """Run the remaining steps, and log where the results are."""
        if self.job.checkpoint.create_seed_checkpoint:
            self._save_seed()
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
        last = self.job.training.steps
        done = self._resume()
        if self.world.rank == 0:
            write_run_record(
                self.folder.path,
                self.job,
                device=self.device,
                processes=self.world.size,
                recipe=self.recipe,
                dtype=self.param_dtype,
            )
        collector = GarbageCollector(self.job.training.gc_freq)
        if done < last:
            logger.info("Training starts at step %d.", done + 1)
        else:
            logger.info("All %d steps of this run are done; raise training.steps to continue", done)
        self.metrics.start(done)
        self.health.start(done)
        with (
            closing(self.data),
            closing(self.metrics),
            fastest_attention(),
            profiling(self.job.profiling, self.folder.path, self.world.rank) as end_of_step,
        ):
            step, timeout = done, self.job.comm.init_timeout_seconds
            asked_before = self.world.sum(torch.tensor(float(self.signals.asked), device=self.device))
            if asked_before:
                self._stop(step, began=step)
            while step < last:
                step += 1
                collector.run(step)
                self.watchdog.begin(step, timeout)
                verdict, asked = self._step(step)
                self.watchdog.pause()  # a save may be slow
                if verdict.action is GuardAction.REWIND:
                    step = self._rewind(step, verdict)
                    continue
                if not asked:  # a stop must not wait for validation
                    self._validate(step, last)
                if self.checkpointer.due(step, last):
                    self.checkpointer.save(step, last, self._state())
                self.checkpointer.poll()
                self.guard.saved(self.checkpointer.last_saved)
                self.metrics.add_saving(self.checkpointer.take_paused_seconds())
                if timeout != self.job.comm.train_timeout_seconds:
                    timeout = self.job.comm.train_timeout_seconds
                    mesh.set_timeout(timeout)
                end_of_step()
                yield step
                if asked and step < last:
                    self._stop(step, began=done)
            self.checkpointer.wait()
            if self.job.checkpoint.last_save_in_hf:
                self._export(last)

    def _step(self, step: int) -> tuple[StepVerdict, float]:
        """Run one optimizer step. Returns the guard's verdict, and the number of processes asked to stop.

        Raises `BadNumbers` if the guard stops the run.
        """
        settings = self.job
        lr = settings.optimizer.lr * lr_factor(step, settings.training.steps, settings.lr_scheduler)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad()

        batches: list[tuple[Tensor, Tensor]] = []  # kept in case the step must be rerun
        monitor = self.monitor if self.health.due(step) else None
        with quantization.measure_step(monitor):
            local_loss = self._gradients(self._next_batches(batches))
        self.scales.end_step(step)
        norm = clip_gradients(self.model, settings.training.max_norm, self.world.pipeline)
        # The only place where the host waits for the device: the guard needs the numbers before the update.
        both = self.world.sum(torch.stack([local_loss, local_loss.new_tensor(self.signals.asked)]))
        loss, asked, grad_norm = torch.cat([both, norm.to(both).view(1)]).tolist()

        verdict = self.guard.judge(step, loss, grad_norm)
        if monitor is not None:
            self._report_health(step, monitor.table.rows, batches[0])
        if verdict.action is GuardAction.UPDATE:
            self.optimizer.step()
            quantization.after_optimizer_step(self.model, settings.float8)
        self.tokens_seen += self.global_tokens
        self.metrics.end_step()
        if self.metrics.due(step) or verdict.reason:
            self.metrics.report(
                step=step,
                loss=loss,
                loss_max=self.world.largest_mean(local_loss),
                grad_norm=grad_norm,
                lr=lr,
                tokens=self.tokens_seen,
                counts={**self.guard.counts(), **self.scales.take_counts()},
            )
        if verdict.action is GuardAction.STOP:
            raise BadNumbers(self._diagnosis(step, verdict, batches))
        return verdict, asked

    def _gradients(
        self, batches: Iterable[tuple[Tensor, Tensor]], on_loss: Callable[[Tensor], None] = lambda loss: None
    ) -> Tensor:
        """Accumulate the gradients of `batches`. Returns the sum of their losses on this process, a scalar.

        `on_loss` is called with the loss of each microbatch.
        """

        def share(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
            loss = self.loss_sum(logits_BSV, labels_BS) / self.global_tokens
            on_loss(loss)
            return loss

        total = torch.zeros((), device=self.device)
        with (
            computing_in_copies(self.model),
            quantization.cast_weights_in_step(self.model, self.job, self.world.size),
        ):
            for number, (tokens_BS, labels_BS) in enumerate(batches, start=1):
                reduce_gradients_now(self.model, last=number == self.accumulation)
                with loss_context(parallel=self.world.loss_parallel):
                    if self.pipeline is not None:
                        total += self.pipeline.gradients(tokens_BS, labels_BS, share)
                    else:
                        loss = share(self._logits(tokens_BS), labels_BS)
                        loss.backward()
                        total += loss.detach()
                self.watchdog.progress()
        return total

    def _logits(self, tokens_BS: Tensor) -> Tensor:
        """The first argument of `loss_sum`: the logits, or the tokens if the loss is chunked."""
        return tokens_BS if self.chunked else self.model(tokens_BS)

    def _report_health(self, step: int, rows: Sequence[HealthRow], batch: tuple[Tensor, Tensor]) -> None:
        """Write the health measurements and warn about bad ones; other recipes are tried on `batch`."""
        tokens_BS, labels_BS = batch
        self.health.write(step, rows)
        if self.metrics.tracks:
            self.metrics.track(step, curves(rows))

        def trial(layer: str) -> tuple[Sequence[HealthRow], Sequence[str]]:
            start = time.perf_counter()
            reduce_gradients_now(self.model, last=False)  # the trial computes no gradients to reduce
            with computing_in_copies(self.model), loss_context(parallel=self.world.loss_parallel):
                result = quantization.try_recipes(
                    self.model,
                    layer,
                    self.job.float8,
                    lambda: self.loss_sum(self._logits(tokens_BS), labels_BS) / self.global_tokens,
                )
            self.metrics.pause(time.perf_counter() - start)
            self.watchdog.progress()
            return result

        self.health.judge(step, rows, trial)

    def _next_batches(self, keep: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the microbatches of one step, and append them to `keep`."""
        for _ in range(self.accumulation):
            keep.append(self._next_batch())
            yield keep[-1]

    def _validate(self, step: int, last: int) -> None:
        """Measure the loss on held-out text if validation is due after `step`."""
        freq = self.job.validation.freq
        if self.validator is not None and (step % freq == 0 or step == last):
            with computing_in_copies(self.model), loss_context(parallel=self.world.loss_parallel):
                forward = self._logits if self.pipeline is None else self.pipeline.forward
                report = self.validator.run(self.model, self.loss_sum, forward)
            self.metrics.report_validation(step, report)

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """The next microbatch on the device: tokens and labels, int64 [B, S]."""
        start = time.perf_counter()
        tokens_BS, labels_BS = self.data.next_batch()
        self.metrics.add_batch(tokens_BS.numel() // self.world.tokens_shared, time.perf_counter() - start)
        labels_BS = self.world.local_labels(labels_BS)
        return tokens_BS.to(self.device, non_blocking=True), labels_BS.to(self.device, non_blocking=True)

    def _diagnosis(self, step: int, verdict: StepVerdict, batches: Sequence[tuple[Tensor, Tensor]]) -> str:
        """The message about a step that stops the run."""
        message = f"Step {step}: stopped before the update: {verdict.reason}"
        if verdict.non_finite:
            self.watchdog.pause()
            self.optimizer.zero_grad()
            message += f"; {first_non_finite(self.model, lambda check: self._gradients(batches, check))}"
        return (
            f"{message}. Rerunning the same command fails again: lower optimizer.lr, or skip the step with "
            "--fault_tolerance.non_finite=skip or rewind"
        )

    def _rewind(self, step: int, verdict: StepVerdict) -> int:
        """Load the last checkpoint, but keep the data position; returns its step."""
        state = self.checkpointer.load()
        if state is None:
            raise BadNumbers(f"Step {step}: {verdict.reason}, and there is no checkpoint yet to go back to")
        done = int(state["step"])
        self.tokens_seen = state["tokens_seen"]
        self.guard.rewound(state["guard"])
        self.scales.load_state_dict(state.get("scales"))
        self.metrics.start(done)
        self.health.start(done)
        logger.warning(
            "Step %d: %s. Rewound to the checkpoint of step %d; the data continues after step %d, so the "
            "batches in between are skipped",
            *(step, verdict.reason, done, step),
        )
        return done

    def _stop(self, step: int, *, began: int) -> NoReturn:
        """Save `step` unless the run `began` with it, and raise `Stopped`; all processes call it together."""
        settings = self.job.checkpoint
        saves = settings.enable and not settings.load_only
        self.checkpointer.wait()
        if saves and self.checkpointer.last_saved != step > began:
            self.checkpointer.save(step, self.job.training.steps, self._state())
            self.checkpointer.wait()
        saved = self.checkpointer.last_saved if step > began else step
        raise Stopped.after(step, self.signals.gather(), saves=saves, saved=saved)

    def _state(self) -> dict[str, Any]:
        """The non-tensor state of a checkpoint; the same on every process."""
        data_states: list[Any] = [None] * self.world.size
        dist.all_gather_object(data_states, self.data.state_dict())
        return {
            "octavo": octavo.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "config": self.job.to_dict(),
            "layout": self.world.layout.degrees,
            "tokens_seen": self.tokens_seen,
            "data": merge_state_dicts(data_states),
            "schedule": self.schedule,
            "guard": self.guard.state_dict(),
            "scales": self.scales.state_dict(),
        }

    def _resume(self) -> int:
        """Resume from a checkpoint if there is one; returns the number of steps done."""
        state = self.checkpointer.load(self.job.training.steps)
        if state is None:
            state = self._load_initial()
        if state is None:
            return 0
        data = self.data.load_state_dict(state["data"]) if "data" in state else "it starts anew"
        self.tokens_seen = state["tokens_seen"]
        not_exact = {"data position": data, **state["not_exact"]}
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        not_exact |= self.scales.load_state_dict(state.get("scales"))
        logger.info("%s", resume_message(state["step"], self.tokens_seen, not_exact))
        if state["schedule"] != self.schedule:
            logger.warning(
                "The optimizer settings differ from the checkpoint's: %s then, %s now",
                state["schedule"],
                self.schedule,
            )
        return int(state["step"])

    def _load_initial(self) -> dict[str, Any] | None:
        """Load the initial weights that the job names, if any. Returns the state of the other run if the job
        loads all of it, else None.
        """
        if self.initial is None:
            return None
        if not self.job.checkpoint.initial_load_model_only:
            return self.checkpointer.load_initial(self.initial.folder)
        self.initial.load(self.model)
        return None

    def _save_seed(self) -> None:
        """Save step 0, from which runs on any number of processes can start."""
        folder = self.folder.path / self.job.checkpoint.folder
        if self._resume() or self.checkpointer.found_checkpoints:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint = true: {folder} holds checkpoints; name another folder, "
                "or leave it out"
            )
        with closing(self.data), closing(self.metrics):
            self.checkpointer.save(0, self.job.training.steps, self._state())
            self.checkpointer.wait()
        if self.checkpointer.last_saved is None:
            raise ConfigError(f"{folder}: the seed checkpoint was not saved")

    def _export(self, step: int) -> None:
        """Export the trained model in Hugging Face's format, unless an earlier run of this job did."""
        settings, spec = self.job.checkpoint, models.get(self.job.model.name)
        out = final_export_folder(self.folder.path / settings.folder, step)
        exported = torch.tensor(int(out.exists()), device=self.device)
        dist.broadcast(exported, 0)  # rank 0 writes; the others may not see its disk
        if not exported.item():
            mesh.set_timeout(self.job.comm.init_timeout_seconds)  # the others wait while one writes
            export_final(
                self.model,
                out,
                settings.export_dtype,
                spec,
                self.model_args,
                self.tokenizer,
                pipeline=self.world.pipeline,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `argv` (default: the command line) says; returns the exit code (see `exit_codes`)."""
    init_logger()

    def train(signals: Signals, watchdog: Watchdog) -> None:
        job = config.load(sys.argv[1:] if argv is None else argv)
        config.check(job, world_size=int(os.environ.get("WORLD_SIZE", "1")), gpus=torch.cuda.device_count())
        signals.saves = job.checkpoint.enable
        Trainer(job, signals, watchdog).train()

    return exit_code_of(train)
