"""A step makes the host wait for the device once: the guard must see loss and norm before the update.

Here every tensor is a CPU's, so what would wait for a GPU is whatever reads a tensor's values in Python.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.helpers import launching

READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
}


class HostReads(TorchFunctionMode):
    """Notes the calls that read values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        emulates = sys._getframe(1).f_code.co_name == "to_float32"  # on a CPU only
        if func in READS and not emulates:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("recipe", "reads"),
    [
        ("rowwise", ["tolist"]),
        # The second one is of maxima, right after the first: the device has nothing left to do.
        ("tensorwise_previous_step", ["tolist", "tolist"]),
    ],
)
def test_the_host_waits_once(tmp_path, recipe: str, reads: list[str]) -> None:
    flags = {
        **launching.shallow(2),
        "experimental.custom_import": "tests.helpers.count_reads",
        **launching.recipe(recipe),
        "float8.emulate": True,
        "training.steps": 3,
        "training.global_batch_size": 8,  # two microbatches
        "metrics.log_freq": 100,  # a step that is reported reads more
    }
    assert launching.train(tmp_path, flags).exit_codes == [0]

    assert json.loads((tmp_path / "reads2.json").read_text()) == reads


def test_reads_are_noticed() -> None:
    x = torch.ones(2)
    with HostReads() as reads:
        assert float(x.sum()) == x.tolist()[0] + x[0].item() == 2
        assert x.sum() > 1

    assert reads.calls == ["__float__", "tolist", "item", "__bool__"]
