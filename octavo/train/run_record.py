"""Writes `run.json`, the record of how a run was started, and logs where its results are."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.config import ConfigError, JobConfig
from octavo.core.fs import write_file
from octavo.core.logging import logger
from octavo.train.hooks import Hook


class RecordRun(Hook):
    """Writes `run.json` into `folder`, if that is given, once the run starts.

    recipe: the float8 recipe, or None. dtype: the high-precision dtype.
    """

    def __init__(
        self,
        job: JobConfig,
        folder: Path | None,
        *,
        device: torch.device,
        processes: int,
        recipe: str | None,
        dtype: torch.dtype,
    ):
        self._job, self._folder, self._device, self._processes = job, folder, device, processes
        self._recipe, self._high = recipe, str(dtype).removeprefix("torch.")

    def on_start(self, step: int) -> None:
        if self._folder is None:
            return
        record: dict[str, Any] = {
            "octavo": octavo.__version__,
            "commit": _commit(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "cpu": processor(),
            "processes": self._processes,
            "threads": torch.get_num_threads(),
            "precision": self._recipe or self._high,
            "high_precision_dtype": self._high,
            "config": self._job.to_dict(),
        }
        path, self._folder = self._folder / "run.json", None  # a rewind starts no new run
        try:
            write_file(path, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(
                f"job.dump_folder: {path} cannot be written: {error.strerror}; name another folder, or free "
                "some space"
            ) from None


def _commit() -> str | None:
    """The commit of octavo's checkout, with "-dirty" if files differ; None if octavo is installed."""
    root = Path(octavo.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def log_results(folder: Path, job: JobConfig) -> None:
    """Log where the results are and how to view them."""
    logger.info("Everything was written to %s. To view the losses: tail %s", folder, folder / "metrics.jsonl")
    if job.metrics.enable_tensorboard:
        logger.info("To view the curves: tensorboard --logdir %s", folder / job.metrics.save_tb_folder)
