"""Gradients of replicas add up, in buckets, once a step, also where a parameter has none."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from octavo.distributed import ddp
from octavo.distributed.parallelize_plan import Replicas
from tests.helpers import ranks


class Model(nn.Module):
    """Three layers, one of which is used twice and one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.unused, self.b = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()).relu())


def gradients(bucket_bytes, dtype):
    """How far this process's gradients of three microbatches are from their sum over all, relatively."""
    ddp._BUCKET_BYTES = bucket_bytes
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(world, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    alone = Model()
    alone(x.flatten(0, 2)).square().sum().backward()
    model = Model()
    names = list(model.state_dict())
    mesh = init_device_mesh("cpu", (world,))
    ddp.replicate_model(model, Replicas(mesh, dtype))
    for _ in range(2):
        model.zero_grad()
        for number, batch in enumerate(x[rank]):
            ddp.reduce_gradients_now(model, last=number == 2)
            model(batch).square().sum().backward()
    assert list(model.state_dict()) == names
    assert model.unused.weight.grad is None
    pairs = [
        (p.grad, want.grad)
        for p, want in zip(model.parameters(), alone.parameters(), strict=True)
        if want.grad is not None
    ]
    assert len(pairs) == 4
    assert all(grad.dtype == torch.float32 for grad, _ in pairs)
    return max(((grad - want).norm() / want.norm()).item() for grad, want in pairs)


@pytest.mark.parametrize(
    ("world", "bucket_bytes", "dtype", "limit"),
    [
        (2, 2**20, torch.float32, 1e-6),
        (3, 300, torch.float32, 1e-6),
        (2, 1, torch.bfloat16, 1e-2),
    ],
)
def test_gradients_are_those_of_one_process(world, bucket_bytes, dtype, limit):
    assert max(ranks.run(world, gradients, bucket_bytes, dtype)) < limit
