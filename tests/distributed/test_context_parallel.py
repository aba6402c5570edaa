"""Processes that share a sequence compute what one would."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from octavo.distributed.context_parallel import (
    ContextAttention,
    gather_sequence,
    in_order,
    local_positions,
    positions_of,
)
from tests.helpers import ranks

B, H, G, S, E = 2, 4, 2, 24, 8


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_position_has_one_process_and_each_the_same_work(size):
    parts = [positions_of(rank, size, 24) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(24))
    assert len({int(part.sum()) for part in parts}) == 1  # a query costs as many keys as its position
    assert torch.cat(parts)[in_order(size, 24)].tolist() == list(range(24))


def tensors():
    g = torch.Generator().manual_seed(0)
    shapes = ((B, H, S, E), (B, G, S, E), (B, G, S, E), (B, H, S, E))
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def document_mask():
    documents = torch.tensor([0] * 7 + [1] * 9 + [2] * 8).expand(B, S)
    return (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)


def differences(masked):
    """How far output and gradients of this process are from its part of one process's."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    mine = local_positions(mesh, S, torch.device("cpu"))
    *inputs, dy = tensors()
    whole = [x.clone().requires_grad_() for x in inputs]
    mask = document_mask() if masked else torch.ones(S, S, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(*whole, attn_mask=mask, enable_gqa=True)
    want.backward(dy)
    parts = [x[:, :, mine].clone().requires_grad_() for x in inputs]
    got = ContextAttention(mesh)(*parts, mask[:, :, mine] if masked else None)
    got.backward(dy[:, :, mine])
    pairs = [(got, want), *((p.grad, w.grad) for p, w in zip(parts, whole, strict=True))]
    return [(a - b[:, :, mine]).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_attention_is_exact(world, masked):
    for found in ranks.run(world, differences, masked):
        assert max(found) < 1e-12


def gathered():
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    mine = local_positions(mesh, S, torch.device("cpu"))
    return torch.equal(gather_sequence(tensors()[1][:, :, mine], mesh), tensors()[1])


def test_a_gathered_sequence_is_in_order():
    assert ranks.run(3, gathered) == [True] * 3
