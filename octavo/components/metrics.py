"""What a run reports: a log line, a line of JSON, and TensorBoard events, all from one `StepReport`.

    step:  1  loss:  8.1294  memory:  0.63GiB(2.69%)  tps: 3,106  tflops: 0.13  mfu: 34.12%

tps is tokens per second and device since the last line; tflops is tps times the model's FLOPs per token;
mfu is tflops over the device's peak. Time spent waiting for data is measured around the wait itself.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from octavo.components.device import Peak, memory_in_use
from octavo.components.logging import logger
from octavo.components.validation import ValidationReport
from octavo.config import ConfigError
from octavo.config.schema import Metrics


@dataclass(frozen=True)
class StepReport:
    """One reported step. Rates are per device, over the steps since the last report (`interval_steps` of
    them).

    tokens: seen by all devices since the run began. seconds: per step. data_seconds: waited for data, per
    step. saving_seconds: that training stood still for checkpoints, in all these steps together.
    mfu: percent, None where the device's peak is unknown. skipped_steps, spikes, rewinds: since the run
    began.
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


# TensorBoard's names, which existing dashboards know -> our fields
_TENSORBOARD = {
    "loss_metrics/global_avg_loss": "loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "throughput(tps)": "tps",
    "tflops": "tflops",
    "mfu(%)": "mfu",
    "memory/max_reserved(GiB)": "memory_gib",
    "memory/max_reserved(%)": "memory_percent",
    "time_metrics/end_to_end(s)": "seconds",
    "time_metrics/data_loading(s)": "data_seconds",
    "n_tokens_seen": "tokens",
    "fault_tolerance/skipped_steps": "skipped_steps",
    "fault_tolerance/spikes": "spikes",
    "fault_tolerance/rewinds": "rewinds",
}


class _Colors:
    """Terminal colours by the part of the line, or none."""

    def __init__(self, on: bool):
        self.step, self.loss, self.memory, self.tps, self.tflops, self.mfu, self.reset = (
            [f"\033[{code}m" for code in (31, 32, 33, 34, 36, 35, 39)] if on else [""] * 7
        )


def format_line(report: StepReport, colors: _Colors, *, grad_norm: bool) -> str:
    """The step's log line, in the form that torchtitan's readers know."""
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


class _TensorBoard:
    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "metrics.enable_tensorboard = true: the package tensorboard is not installed; "
                "pip install tensorboard, or leave it off (metrics.jsonl is always written)"
            ) from None
        self._writer = SummaryWriter(str(folder), max_queue=1000)

    def write(self, report: StepReport) -> None:
        for tag, name in _TENSORBOARD.items():
            value = getattr(report, name)
            if value is not None:
                self._writer.add_scalar(tag, value, report.step)
        waited = 100 * report.data_seconds / report.seconds
        self._writer.add_scalar("time_metrics/data_loading(%)", waited, report.step)

    def write_validation(self, step: int, found: ValidationReport) -> None:
        self._writer.add_scalar("validation_metrics/global_avg_loss", found.loss, step)
        if found.bits_per_byte is not None:
            self._writer.add_scalar("validation_metrics/bits_per_byte", found.bits_per_byte, step)

    def close(self) -> None:
        self._writer.close()


def _step_of(line: str) -> float:
    """The step that a line of metrics.jsonl tells of; infinite for a torn line, or one that is not ours."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return math.inf


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity; they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Jsonl:
    """`metrics.jsonl`, one object a reported step, with full precision."""

    def __init__(self, path: Path):
        self._path = path

    def start(self, step: int) -> None:
        """Keep the lines up to `step`, so that a resumed run tells each step once; an older run's file is
        put aside.
        """
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
        if not kept:
            aside = datetime.fromtimestamp(self._path.stat().st_mtime).strftime("%Y%m%d-%H%M%S-%f")
            self._path.rename(self._path.with_name(f"metrics.{aside}.jsonl"))
            return
        partial = self._path.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._path)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line. A full disk costs the line, not the run."""
        line = json.dumps({name: _finite(value) for name, value in values.items()}) + "\n"
        whole = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:
            logger.warning("%s: a line could not be written: %s", self._path, error.strerror)
            with contextlib.suppress(OSError):
                os.truncate(self._path, whole)  # no half lines


class MetricsLogger:
    """Collects tokens and waiting times between reports; reports on the ranks that write."""

    def __init__(
        self,
        settings: Metrics,
        folder: Path,
        *,
        rank: int,
        device: torch.device,
        flops_per_token: float,
        peak: Peak,
        color: bool,
    ):
        self._settings = settings
        self._device = device
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._colors = _Colors(color and not settings.disable_color_printing)
        self._jsonl = _Jsonl(folder / "metrics.jsonl") if rank == 0 else None
        self._tensorboard = None
        if settings.enable_tensorboard and (rank == 0 or settings.save_for_all_ranks):
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            part = f"rank_{rank}" if settings.save_for_all_ranks else ""
            self._tensorboard = _TensorBoard(folder / settings.save_tb_folder / stamp / part)
        self._restart(time.perf_counter())

    def start(self, step: int) -> None:
        """Training begins, or goes on, after `step`."""
        if self._jsonl:
            self._jsonl.start(step)
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self._since = now
        self._tokens = 0
        self._steps = 0
        self._data_seconds = 0.0
        self._saving_seconds = 0.0

    def due(self, step: int) -> bool:
        """Whether `step` is reported: the first one, and every `log_freq`-th."""
        return step == 1 or step % self._settings.log_freq == 0

    def add_batch(self, tokens: int, data_seconds: float) -> None:
        """Count one microbatch of this device: its tokens, and the seconds waited for it."""
        self._tokens += tokens
        self._data_seconds += data_seconds

    def add_saving(self, seconds: float) -> None:
        """Count time that training stood still for a checkpoint."""
        self._saving_seconds += seconds

    def end_step(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    def report(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        counts: Mapping[str, int] = MappingProxyType({}),
    ) -> StepReport:
        """Report the steps since the last report; the device must have finished them. `counts`: the last
        fields of a `StepReport`.
        """
        now = time.perf_counter()
        seconds = now - self._since
        tps = self._tokens / seconds
        memory = memory_in_use(self._device)
        rate = tps * self._flops_per_token
        report = StepReport(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            memory_gib=memory.gib,
            memory_percent=memory.percent,
            tps=tps,
            tflops=rate / 1e12,
            mfu=None if self._peak.flops is None else 100 * rate / self._peak.flops,
            seconds=seconds / self._steps,
            data_seconds=self._data_seconds / self._steps,
            saving_seconds=self._saving_seconds,
            interval_steps=self._steps,
            **counts,
        )
        logger.info(format_line(report, self._colors, grad_norm=self._settings.log_grad_norm))
        if self._jsonl:
            self._jsonl.write(asdict(report))
        if self._tensorboard:
            self._tensorboard.write(report)
        self._restart(now)  # not the time after writing: what reporting costs counts in the next interval
        return report

    def report_validation(self, step: int, found: ValidationReport) -> None:
        """Report a validation after `step`; its time is no part of the training's rates."""
        bits = "n/a" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
        logger.info(
            f"{self._colors.step}validate step: {step:2}  {self._colors.loss}loss: {found.loss:7.4f}  "
            f"{self._colors.tps}bits per byte: {bits}{self._colors.reset}  tokens: {found.tokens:,}  "
            f"seconds: {found.seconds:.1f}"
        )
        values = {
            "step": step,
            "validation_loss": found.loss,
            "validation_bits_per_byte": found.bits_per_byte,
            "validation_tokens": found.tokens,
            "validation_seconds": found.seconds,
        }
        if self._jsonl:
            self._jsonl.write(values)
        if self._tensorboard:
            self._tensorboard.write_validation(step, found)
        self._since += found.seconds

    def close(self) -> None:
        """Flush what is buffered."""
        if self._tensorboard:
            self._tensorboard.close()
