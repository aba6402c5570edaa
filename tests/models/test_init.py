"""Initial weights depend on the seed and the parameter's name only."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from octavo.models.init import Normal, Ones, draw, init_weights, plain_name, stream_seed
from tests.helpers import ranks


class Small(nn.Module):
    def __init__(self, order=("a", "b")):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(5, 7, bias=False))
        self.norm = nn.RMSNorm(5)

    def init_rule(self, name):
        return Ones() if name.startswith("norm") else Normal(0.5)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_order_of_parameters_does_not_matter_and_names_and_seeds_do():
    first, second, other = Small(), Small(order=("b", "a")), Small()
    init_weights(first, seed=1)
    init_weights(second, seed=1)
    init_weights(other, seed=2)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])
    assert not torch.equal(first.a.weight, first.b.weight)
    assert not torch.equal(first.a.weight, other.a.weight)
    assert torch.equal(first.norm.weight, torch.ones(5))


def test_wrappers_do_not_change_the_names():
    assert plain_name("layers.0._checkpoint_wrapped_module.wq._orig_mod.weight") == "layers.0.wq.weight"


def test_distribution_and_cutoff():
    values = draw(Normal(0.5, cutoff=1.5), torch.Size((200, 200)), torch.device("cpu"), seed=0)
    assert values.abs().max() <= 0.75
    assert values.mean().abs() < 0.01
    wide = draw(Normal(0.5), torch.Size((200, 200)), torch.device("cpu"), seed=0)
    assert wide.std().item() == pytest.approx(0.5, rel=0.02)


def test_stream_seed_is_stable():
    """A recorded value: another one would change the initial weights of every run."""
    assert stream_seed(42, "layers.0.attention.wq.weight") == 2429724869875813722


def _sharded_equals_whole():
    whole = Small()
    init_weights(whole, seed=1)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    sharded = Small()
    fully_shard(sharded, mesh=mesh)
    init_weights(sharded, seed=1)
    return [torch.equal(p.full_tensor(), weights(whole)[name]) for name, p in sharded.named_parameters()]


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_keeps_its_shard_of_the_same_values(world):
    for equal in ranks.run(world, _sharded_equals_whole):
        assert equal == [True] * 3
