"""A Float8Linear that is itself what FSDP2 wraps."""

import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from octavo.float8 import Float8Linear
from tests.helpers import ranks


def _step() -> list[str]:
    linear = Float8Linear(32, 16, bias=False, config="rowwise", emulate=True)
    fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        linear(torch.randn(2, 4, 32, requires_grad=True)).sum().backward()
    return [str(w.message) for w in seen if "view" in str(w.message)]


def test_it_returns_no_view() -> None:
    assert ranks.run(2, _step) == [[], []]
