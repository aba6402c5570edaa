"""Run folders for tests of reports, with losses that a formula gives."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_run(
    folder: Path,
    loss: Callable[[int], float | None],
    *,
    steps: int = 60,
    every: int = 1,
    recipe: str | None = None,
    seed: int = 42,
    data_seed: int | None = None,
    seconds: float = 0.5,
    memory: float = 1.0,
    tokens: int = 2048,
    flavor: str = "debugmodel",
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write the folder of a run of 60 steps that ended after `steps`. loss: of a step, None if not finite.
    tokens: per step.
    """
    folder.mkdir(parents=True)
    record = {
        "octavo": "0.1.0",
        "torch": "2.13.0",
        "device": "cpu",
        "processes": 1,
        "precision": recipe or "float32",
        "high_precision_dtype": "float32",
        "config": {
            "model": {"name": "llama3", "flavor": flavor, "converters": ["float8"] if recipe else []},
            "training": {"seed": seed, "data_seed": data_seed, "steps": 60},
            "optimizer": {"lr": 1e-3, **(settings or {})},
        },
    }
    (folder / "run.json").write_text(json.dumps(record))
    rows = [
        {
            "step": step,
            "loss": loss(step),
            "tokens": step * tokens,
            "memory_gib": memory + 0.001 * (step % 7),
            "tps": 2048 / (seconds * (1 + 0.1 * math.sin(step))),
            "seconds": seconds * (1 + 0.1 * math.sin(step)),
        }
        for step in range(every, steps + 1, every)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def falling(offset: float = 0.0, ripple: float = 0.0, phase: float = 0.0) -> Callable[[int], float]:
    """A loss that falls as a power of the step, noisy as batches are, the same for all; plus an offset and a
    ripple of its own.
    """

    def loss(step: int) -> float:
        noise = 0.1 * math.sin(12.9898 * step)
        return 4 + 4 * step**-0.5 + noise + offset + ripple * math.sin(0.3 * step + phase)

    return loss
