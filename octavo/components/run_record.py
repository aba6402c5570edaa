"""`run.json`, what a run was started with; and its last words."""

import json
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.components.logging import logger
from octavo.config import JobConfig


def write_run_record(
    folder: Path,
    job: JobConfig,
    *,
    device: torch.device,
    processes: int,
    recipe: str | None,
    dtype: torch.dtype,
) -> None:
    """Write `run.json` into `folder`. recipe: of float8, or None. dtype: of what is not in float8."""
    high = str(dtype).removeprefix("torch.")
    record: dict[str, Any] = {
        "octavo": octavo.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": processes,
        "precision": recipe or high,
        "high_precision_dtype": high,
        "config": job.to_dict(),
    }
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n")


def farewell(folder: Path, job: JobConfig) -> None:
    """Say where everything is."""
    logger.info(
        "Everything was written to %s. To look at the losses: tail %s", folder, folder / "metrics.jsonl"
    )
    if job.metrics.enable_tensorboard:
        logger.info("To see the curves: tensorboard --logdir %s", folder / job.metrics.save_tb_folder)
