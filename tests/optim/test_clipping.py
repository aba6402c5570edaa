"""Gradients are scaled to a norm, by all processes alike, whatever each has of them."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from octavo.optim.optimizer import clip_gradients
from tests.helpers import ranks


def model_with_gradients():
    """7 and 3: sizes that two processes do not share evenly."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_scales_as_torch_does(max_norm):
    model, expected = model_with_gradients(), model_with_gradients()
    norm = clip_gradients(model, max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(expected.parameters(), max_norm))
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=0)


def test_small_gradients_stay_bit_for_bit():
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    clip_gradients(model, 100.0)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


def test_nothing_to_clip():
    assert clip_gradients(nn.Linear(2, 2), 1.0) == 0.0


def _clipped_on_a_mesh():
    """What the two-axis mesh makes of the same gradients: the norm, and the gradients put together again."""
    model = model_with_gradients()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for module in model:
        for name, parameter in list(module.named_parameters()):
            placement = Shard(1) if name == "weight" else Replicate()
            shared = distribute_tensor(parameter.detach(), mesh["tensor"], [placement])
            setattr(module, name, nn.Parameter(shared))
    fully_shard(model, mesh=mesh["data"])
    for name, parameter in model.named_parameters():
        parameter.grad = distribute_tensor(whole[name], parameter.device_mesh, parameter.placements)
    norm = clip_gradients(model, 0.5)
    grads = [p.grad for p in model.parameters()]
    assert all(isinstance(grad, DTensor) and grad.device_mesh.ndim == 2 for grad in grads)
    return norm.item(), [grad.full_tensor().tolist() for grad in grads]


def test_on_a_mesh_of_two_axes_all_have_the_same():
    model = model_with_gradients()
    expected = clip_gradients(model, 0.5).item()
    for norm, grads in ranks.run(4, _clipped_on_a_mesh):
        assert norm == pytest.approx(expected, rel=1e-6)
        for got, want in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(got), want.grad, rtol=1e-6, atol=0)
