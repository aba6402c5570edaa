"""The random number generators of one process as plain tensors, which need no pickle to be read.

torch's on the CPU and on the CUDA device that this process uses, Python's `random`, and NumPy's global one
where NumPy is loaded (torch loads it).
"""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """The states now, by generator."""
    states = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch_cuda"] = torch.cuda.get_rng_state()
    _, words, spare = random.getstate()
    states["python"] = torch.tensor(words, dtype=torch.int64)
    states["python_spare"] = _spare(spare is not None, spare)
    if (numpy := sys.modules.get("numpy")) is not None:
        state: Any = numpy.random.get_state(legacy=False)
        states["numpy"] = torch.tensor(
            [*map(int, state["state"]["key"]), int(state["state"]["pos"])], dtype=torch.int64
        )
        states["numpy_spare"] = _spare(state["has_gauss"], state["gauss"])
    return states


def restore(states: Mapping[str, Tensor]) -> list[str]:
    """Set the generators to `states`; returns those of this process that `states` says nothing of."""
    missing = [name for name in capture() if name not in states]
    if "torch_cpu" in states:
        torch.set_rng_state(states["torch_cpu"])
    if "torch_cuda" in states and "torch_cuda" not in missing and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["torch_cuda"])
    if "python" in states:
        has, value = states["python_spare"].tolist()
        random.setstate((3, tuple(states["python"].tolist()), value if has else None))
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        *key, position = states["numpy"].tolist()
        has, value = states["numpy_spare"].tolist()
        numpy.random.set_state(("MT19937", key, position, int(has), value))
    return missing


def _spare(has: Any, value: Any) -> Tensor:
    """The second of a pair of normal numbers, kept for the next call, if there is one: int, float64."""
    return torch.tensor([float(bool(has)), float(value or 0.0)], dtype=torch.float64)
