"""A sharded Llama computes what a whole one does: summed gradients, same names, same bits of the start."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from octavo import models
from octavo.config.schema import ActivationCheckpoint
from octavo.distributed.parallelize_plan import FSDPPlan, Parallelize
from octavo.families import ModelArgs
from octavo.models.init import init_weights, plain_name
from octavo.models.transformer import Transformer
from tests.helpers import ranks

ARGS = ModelArgs(dim=30, n_layers=2, n_heads=5, n_kv_heads=5, hidden_dim=50, vocab_size=67, max_seq_len=8)


def gradients(tied, tokens, sharding):
    with torch.device("meta"):
        model = Transformer(replace(ARGS, tie_embeddings=tied))
    plan = Parallelize(ActivationCheckpoint(mode="full"), compile_model=False, sharding=sharding)
    models.get("llama3").parallelize(model, plan)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    (model(tokens).float().square().sum() / 1000).backward()
    return {
        plain_name(name): (p.grad.full_tensor() if sharding else p.grad)
        for name, p in model.named_parameters()
    }


def compare(tied, reshard, replicas, offload):
    world, rank = dist.get_world_size(), dist.get_rank()
    shape = (replicas, world // replicas) if replicas > 1 else (world,)
    names = ("dp_replicate", "dp_shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    sharding = FSDPPlan(mesh, torch.float32, torch.float32, reshard=reshard, cpu_offload=offload)
    tokens = torch.arange(2 * world * 8).remainder(67).view(2 * world, 8)
    expected = gradients(tied, tokens, None)
    got = gradients(tied, tokens[2 * rank : 2 * rank + 2], sharding)
    assert got.keys() == expected.keys()
    return max(((got[n] - e).norm() / e.norm()).item() for n, e in expected.items())


@pytest.mark.parametrize(
    ("world", "replicas", "tied", "reshard", "offload"),
    [
        (2, 1, False, True, False),
        (3, 1, True, True, False),
        (4, 2, False, False, False),
        (2, 2, True, True, False),
        (2, 1, False, True, True),  # what of offloading is the same without a GPU: where states live
    ],
)
def test_gradients_add_up_to_those_of_one_process(world, replicas, tied, reshard, offload):
    assert max(ranks.run(world, compare, tied, reshard, replicas, offload)) < 1e-6


def dtypes_in_bfloat16():
    """What each layer's attention is called with, and what the model gives."""
    with torch.device("meta"):
        model = Transformer(ARGS)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    sharding = FSDPPlan(mesh, torch.bfloat16, torch.float32, reshard=True, cpu_offload=False)
    plan = Parallelize(ActivationCheckpoint(mode="none"), compile_model=False, sharding=sharding)
    models.get("llama3").parallelize(model, plan)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    seen = []
    for layer in model.layers.values():
        layer.attention.register_forward_pre_hook(lambda _, args: seen.append([x.dtype for x in args[:2]]))
    logits = model(torch.arange(16).view(2, 8))
    return seen, logits.dtype


def test_layers_compute_in_bfloat16_but_for_the_rotary_table():
    for seen, logits in ranks.run(2, dtypes_in_bfloat16):
        assert seen == [[torch.bfloat16, torch.float32]] * ARGS.n_layers
        assert logits == torch.bfloat16
