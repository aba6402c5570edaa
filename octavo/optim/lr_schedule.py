"""The learning rate as a pure function of the step: warmup, then stable, then decay (arXiv:2404.06395).

The rate of step s depends only on `settings` and s, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from octavo.config.schema import LRScheduler, Optimizer

# decay progress in (0, 1] -> the factor that is left, before min_lr_factor
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(step: int, steps: int, settings: LRScheduler) -> float:
    """The share of the full learning rate at `step` (counted from 1) of a run of `steps`.

    The schedule spans `total_steps`, or the run where that is None. Warmup rises linearly and reaches 1 at
    step `warmup_steps + 1`. The decay takes the last `decay_ratio` of the schedule (all that follows the
    warmup where it is None) and would reach `min_lr_factor` in the step after its last.
    """
    steps = settings.total_steps or steps
    warmup = min(settings.warmup_steps, steps)
    if step <= warmup:
        return step / (warmup + 1)
    decay = steps - warmup if settings.decay_ratio is None else round(steps * settings.decay_ratio)
    decay = min(decay, steps - warmup)
    into = step - 1 - (steps - decay)  # steps of decay that are already behind
    if into <= 0:
        return 1.0
    left = _DECAYS[settings.decay_type](min(1.0, into / decay))
    return settings.min_lr_factor + (1.0 - settings.min_lr_factor) * left


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def schedule_of(optimizer: Optimizer, lr_scheduler: LRScheduler, training_steps: int) -> dict[str, Any]:
    """The settings that an update depends on, stored in checkpoints to detect changes."""
    return {
        "optimizer": asdict(optimizer),
        "lr_scheduler": asdict(lr_scheduler),
        "steps": (lr_scheduler.total_steps or training_steps) if lr_scheduler.decay_ratio != 0 else None,
    }
