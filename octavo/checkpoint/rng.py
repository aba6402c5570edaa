"""The states of a process's random number generators as plain tensors, which are read without pickle.

Saved are torch's generators on the CPU and on this process's CUDA device, Python's `random`, and NumPy's
global generator if NumPy is loaded (torch loads it).
"""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """The current states, by generator."""
    states = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch_cuda"] = torch.cuda.get_rng_state()
    _, words, spare = random.getstate()
    states["python"] = torch.tensor(words, dtype=torch.int64)
    states["python_spare"] = _spare_normal(spare is not None, spare)
    if (numpy := sys.modules.get("numpy")) is not None:
        state: Any = numpy.random.get_state(legacy=False)
        states["numpy"] = torch.tensor(
            [*map(int, state["state"]["key"]), int(state["state"]["pos"])], dtype=torch.int64
        )
        states["numpy_spare"] = _spare_normal(state["has_gauss"], state["gauss"])
    return states


def restore(states: Mapping[str, Tensor]) -> list[str]:
    """Set the generators to `states`; returns those of this process that `states` lacks."""
    missing = [name for name in capture() if name not in states]
    if "torch_cpu" in states:
        torch.set_rng_state(states["torch_cpu"])
    if "torch_cuda" in states and "torch_cuda" not in missing and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["torch_cuda"])
    if "python" in states:
        has_spare, value = states["python_spare"].tolist()
        random.setstate((3, tuple(states["python"].tolist()), value if has_spare else None))
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        *key, position = states["numpy"].tolist()
        has_spare, value = states["numpy_spare"].tolist()
        numpy.random.set_state(("MT19937", key, position, int(has_spare), value))
    return missing


def _spare_normal(exists: Any, value: Any) -> Tensor:
    """(exists, value): the second number of a normal pair, kept for the next call; float64 [2]."""
    return torch.tensor([float(bool(exists)), float(value or 0.0)], dtype=torch.float64)
