"""Training metrics: the log line, the line of `metrics.jsonl` and the trackers' values of a `StepReport`.

    step:  1  loss:  8.1294  memory:  0.63GiB(2.69%)  tps: 3,106  tflops: 0.13  mfu: 34.12%

tps is tokens per second and device since the last line; tflops is tps times the model's FLOPs per token;
mfu is tflops over the device's peak (`mfu.py` defines it, mfu_mixed and hfu). Time waiting for data is
measured around the wait itself. `docs/metrics.md` lists every name.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from octavo.config.schema import JobConfig, Metrics
from octavo.core.format import count, format_clock
from octavo.core.logging import logger, wants_color
from octavo.metrics.device import Peak, memory_in_use, peak_flops
from octavo.metrics.jsonl import Jsonl
from octavo.metrics.mfu import Utilization, Work, utilization
from octavo.metrics.step_times import StepTimes, seconds_compiling
from octavo.metrics.trackers import Service, TensorBoard, Tracker


@dataclass(frozen=True)
class ValidationReport:
    """loss: nats per token. bits_per_byte: None if the labels decode to no text. tokens: labels counted over
    all ranks. seconds: duration of the validation.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class StepReport:
    """One reported step. Rates are per device, over the steps since the last report (`interval_steps` of
    them).

    tokens: seen by all devices since the run began. seconds: per step. data_seconds: waiting for data, per
    step. saving_seconds, compile_seconds: total seconds that training was blocked by checkpoints, and that
    torch.compile took, in the interval. mfu, mfu_mixed, hfu: percent, None where a peak is unknown.
    loss_max: the largest mean loss of any process. skipped_steps, spikes, rewinds: since the run began.
    step_p50, step_p90, step_p99: step time percentiles in seconds, over recent steps without compilation.
    float8_saturated: under delayed scaling, the largest share of an operand's elements that saturated in a
    step; float8_fallbacks: steps since the run began after which a scale was computed just in time.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    memory_gib: float
    memory_percent: float
    tps: float
    tflops: float
    mfu: float | None
    seconds: float
    data_seconds: float
    saving_seconds: float
    interval_steps: int
    skipped_steps: int = 0
    spikes: int = 0
    rewinds: int = 0
    loss_max: float | None = None
    memory_active_gib: float | None = None
    memory_active_percent: float | None = None
    num_ooms: int = 0
    num_alloc_retries: int = 0
    mfu_mixed: float | None = None
    hfu: float | None = None
    compile_seconds: float = 0.0
    step_p50: float | None = None
    step_p90: float | None = None
    step_p99: float | None = None
    float8_saturated: float = 0.0
    float8_fallbacks: int = 0

    @property
    def data_percent(self) -> float:
        """Percentage of the time spent waiting for data."""
        return 100 * self.data_seconds / self.seconds


# Tracker tag (most are torchtitan's, for existing dashboards) -> field of StepReport
_TRACKED = {
    "loss_metrics/global_avg_loss": "loss",
    "loss_metrics/global_max_loss": "loss_max",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "throughput(tps)": "tps",
    "tflops": "tflops",
    "mfu(%)": "mfu",
    "time_metrics/end_to_end(s)": "seconds",
    "time_metrics/data_loading(s)": "data_seconds",
    "time_metrics/data_loading(%)": "data_percent",
    "memory/max_reserved(GiB)": "memory_gib",
    "memory/max_reserved(%)": "memory_percent",
    "memory/max_active(GiB)": "memory_active_gib",
    "memory/max_active(%)": "memory_active_percent",
    "memory/num_ooms": "num_ooms",
    "memory/num_alloc_retries": "num_alloc_retries",
    "n_tokens_seen": "tokens",
    "mfu_mixed(%)": "mfu_mixed",
    "hfu(%)": "hfu",
    "time_metrics/step_p50(s)": "step_p50",
    "time_metrics/step_p90(s)": "step_p90",
    "time_metrics/step_p99(s)": "step_p99",
    "time_metrics/compile(s)": "compile_seconds",
    "time_metrics/saving(s)": "saving_seconds",
    "fault_tolerance/skipped_steps": "skipped_steps",
    "fault_tolerance/spikes": "spikes",
    "fault_tolerance/rewinds": "rewinds",
    "float8/saturated": "float8_saturated",
    "float8/fallbacks": "float8_fallbacks",
}


def tracked(report: StepReport) -> dict[str, float]:
    """The tracker values of `report`, without those that are None."""
    values = {tag: getattr(report, name) for tag, name in _TRACKED.items()}
    return {tag: value for tag, value in values.items() if value is not None}


class _Colors:
    """Terminal colour codes of the parts of the log line; empty strings if off."""

    def __init__(self, on: bool):
        self.step, self.loss, self.memory, self.tps, self.tflops, self.mfu, self.reset = (
            [f"\033[{code}m" for code in (31, 32, 33, 34, 36, 35, 39)] if on else [""] * 7
        )


def format_line(report: StepReport, colors: _Colors, *, grad_norm: bool) -> str:
    """The log line of a step, in torchtitan's format."""
    mfu = "n/a" if report.mfu is None else f"{report.mfu:.2f}%"
    norm = f"grad_norm: {report.grad_norm:7.4f}  " if grad_norm else ""
    return (
        f"{colors.step}step: {report.step:2}  "
        f"{colors.loss}loss: {report.loss:7.4f}  {norm}"
        f"{colors.memory}memory: {report.memory_gib:5.2f}GiB({report.memory_percent:.2f}%)  "
        f"{colors.tps}tps: {round(report.tps):,}  "
        f"{colors.tflops}tflops: {report.tflops:,.2f}  "
        f"{colors.mfu}mfu: {mfu}{colors.reset}"
    )


def format_progress(
    report: StepReport, steps: int, step_seconds: float | None, epoch_tokens: int | None
) -> str:
    """What `metrics.log_progress` adds to the line of a step, of `steps`."""
    left = "n/a" if step_seconds is None else format_clock((steps - report.step) * step_seconds)
    epoch = f"  epoch: {report.tokens / epoch_tokens:.2f}" if epoch_tokens else ""
    return f"  progress: {report.step}/{steps}  eta: {left}  lr: {report.lr:.2e}{epoch}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}%"


class MetricsLogger:
    """Collects tokens and waiting times between reports, and writes the reports.

    steps, epoch_tokens: of the run and its data, None for data without epochs. config, description: of the
    run, sent to the trackers; must contain no secrets.
    """

    def __init__(
        self,
        settings: Metrics,
        folder: Path,
        *,
        rank: int,
        device: torch.device,
        work: Work,
        peak: Peak,
        color: bool,
        steps: int,
        epoch_tokens: int | None = None,
        config: Mapping[str, Any] = MappingProxyType({}),
        description: str = "",
    ):
        self._settings = settings
        self._device = device
        self._work = work
        self._peak = peak
        self._colors = _Colors(color and not settings.disable_color_printing)
        self._steps_in_all, self._epoch_tokens = steps, epoch_tokens
        self._jsonl = Jsonl(folder / "metrics.jsonl") if rank == 0 else None
        self._trackers: list[Tracker] = []
        if settings.enable_tensorboard and (rank == 0 or settings.save_for_all_ranks):
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            part = f"rank_{rank}" if settings.save_for_all_ranks else ""
            self._trackers.append(TensorBoard(folder / settings.save_tb_folder / stamp / part))
        services = {"wandb": settings.enable_wandb, "trackio": settings.enable_trackio}
        self._services = [name for name, wanted in services.items() if wanted and rank == 0]
        self._service_args = (folder, config, description)
        self._times = StepTimes()
        self._steady_tokens = self._steady_data = 0.0
        self._step_tokens = self._step_data = 0.0
        self._compiled = seconds_compiling()
        self._restart(time.perf_counter())

    def start(self, step: int) -> None:
        """Prepare for training to start or resume after `step`."""
        if self._jsonl:
            self._jsonl.start(step)
        while self._services:
            service = Service(self._services.pop(), *self._service_args, resumed=step > 0)
            self._trackers.append(service)
        now = time.perf_counter()
        self._restart(now)
        self._times.start(now)

    def _restart(self, now: float) -> None:
        self._since = now
        self._tokens = 0
        self._steps = 0
        self._data_seconds = 0.0
        self._saving_seconds = 0.0
        self._compile_seconds = 0.0

    def due(self, step: int) -> bool:
        """Whether `step` is reported wherever it is in the run: the first step and every `log_freq`-th."""
        return step == 1 or step % self._settings.log_freq == 0

    def add_batch(self, tokens: int, data_seconds: float) -> None:
        """Count one microbatch of this device: its tokens and the seconds spent waiting for it."""
        self._tokens += tokens
        self._data_seconds += data_seconds
        self._step_tokens += tokens
        self._step_data += data_seconds

    def add_saving(self, seconds: float) -> None:
        """Count seconds that training was blocked by a checkpoint."""
        self._saving_seconds += seconds
        self._times.pause(seconds)

    def end_step(self) -> None:
        """Count one optimizer step."""
        self._steps += 1
        compiled = seconds_compiling()
        steady = len(self._times.steady)
        self._times.end(time.perf_counter(), compiled - self._compiled)
        self._compile_seconds += compiled - self._compiled
        self._compiled = compiled
        if len(self._times.steady) > steady:
            self._steady_tokens += self._step_tokens
            self._steady_data += self._step_data
        self._step_tokens = self._step_data = 0.0

    def report(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        loss_max: float | None = None,
        counts: Mapping[str, Any] = MappingProxyType({}),
    ) -> StepReport:
        """Report the steps since the last report; the device must have finished them.

        `counts`: further fields of `StepReport`, as the guard and delayed scaling count them.
        """
        now = time.perf_counter()
        seconds = now - self._since
        tps = self._tokens / seconds
        memory = memory_in_use(self._device)
        used = utilization(self._work, tps, self._peak)
        times = self._times.recent()
        report = StepReport(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            memory_gib=memory.gib,
            memory_percent=memory.percent,
            tps=tps,
            tflops=tps * self._work.total / 1e12,
            mfu=used.mfu,
            seconds=seconds / self._steps,
            data_seconds=self._data_seconds / self._steps,
            saving_seconds=self._saving_seconds,
            interval_steps=self._steps,
            loss_max=loss_max,
            memory_active_gib=memory.active_gib,
            memory_active_percent=memory.active_percent,
            num_ooms=memory.num_ooms,
            num_alloc_retries=memory.num_alloc_retries,
            mfu_mixed=used.mfu_mixed,
            hfu=used.hfu,
            compile_seconds=self._compile_seconds,
            step_p50=times.p50 if times else None,
            step_p90=times.p90 if times else None,
            step_p99=times.p99 if times else None,
            **counts,
        )
        line = format_line(report, self._colors, grad_norm=self._settings.log_grad_norm)
        if self._settings.log_progress:
            step_seconds = times.p50 if times else None  # the first step compiles and warms up
            line += format_progress(report, self._steps_in_all, step_seconds, self._epoch_tokens)
        logger.info(line, extra={"own_colors": True})
        if self._jsonl:
            self._jsonl.write(asdict(report))
        self.track(step, tracked(report))
        self._restart(now)  # `now` precedes writing, so the time of writing counts in the next interval
        return report

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values` to all trackers."""
        for tracker in self._trackers:
            tracker.write(values, step)

    @property
    def tracks(self) -> bool:
        """Whether there are trackers."""
        return bool(self._trackers)

    def report_validation(self, step: int, validation: ValidationReport) -> None:
        """Report a validation after `step`, and exclude its time from the training rates."""
        bits = "n/a" if validation.bits_per_byte is None else f"{validation.bits_per_byte:.4f}"
        logger.info(
            f"{self._colors.step}validate step: {step:2}  {self._colors.loss}loss: {validation.loss:7.4f}  "
            f"{self._colors.tps}bits per byte: {bits}{self._colors.reset}  tokens: {validation.tokens:,}  "
            f"seconds: {validation.seconds:.1f}",
            extra={"own_colors": True},
        )
        values = {
            "step": step,
            "validation_loss": validation.loss,
            "validation_bits_per_byte": validation.bits_per_byte,
            "validation_tokens": validation.tokens,
            "validation_seconds": validation.seconds,
        }
        if self._jsonl:
            self._jsonl.write(values)
        tags = {"validation_metrics/global_avg_loss": validation.loss}
        if validation.bits_per_byte is not None:
            tags["validation_metrics/bits_per_byte"] = validation.bits_per_byte
        self.track(step, tags)
        self.pause(validation.seconds)

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` from the training rates."""
        self._since += seconds
        self._times.pause(seconds)

    def summary(self) -> str | None:
        """One line about this process's steady steps; None if there were none."""
        times, steady = self._times.all(), sum(self._times.steady)
        if times is None:
            return None
        tps = self._steady_tokens / steady
        used: Utilization = utilization(self._work, tps, self._peak)
        first = f"the first took {self._times.first:.3f} s"
        if self._times.compiling:
            first += (
                f", compiling {self._times.compiling:.1f} s in it and {self._times.compiling_steps} others"
            )
        waited = 100 * self._steady_data / steady
        return (
            f"{count(len(self._times.steady), 'step')} took at most {times.p50:.3f} s (half of them), "
            f"{times.p90:.3f} s (90%), {times.p99:.3f} s (99%); {first}. "
            f"Waited for data {waited:.2f}% of the time. tps {round(tps):,}, mfu {_percent(used.mfu)}, "
            f"mfu_mixed {_percent(used.mfu_mixed)}, hfu {_percent(used.hfu)}"
        )

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self._trackers:
            tracker.close()


def build_metrics(
    job: JobConfig,
    folder: Path,
    *,
    rank: int,
    device: torch.device,
    work: Work,
    epoch_samples: int | None = None,
) -> MetricsLogger:
    """The logger of a run in `folder`; logs the peak that utilisation is measured against."""
    peak = peak_flops(device)
    logger.info(
        "Peak FLOPS used for computing MFU: %s (%s)",
        "none" if peak.flops is None else f"{peak.flops:.3e}",
        peak.source,
    )
    return MetricsLogger(
        job.metrics,
        folder,
        rank=rank,
        device=device,
        work=work,
        peak=peak,
        color=wants_color(),
        steps=job.training.steps,
        epoch_tokens=epoch_samples and epoch_samples * job.training.seq_len,
        config=job.to_dict(),
        description=job.job.description,
    )
