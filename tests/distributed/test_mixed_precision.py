"""A Llama that computes in bfloat16 copies of its parameters has FSDP2's numbers, bit for bit."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from octavo import models
from octavo.config.schema import ActivationCheckpoint
from octavo.distributed.mixed_precision import computing_in_copies, give_copies
from octavo.distributed.parallelize_plan import FSDPPlan, Parallelize
from octavo.families import ModelArgs
from octavo.models.init import init_weights, plain_name
from octavo.models.transformer import Transformer
from tests.helpers import ranks

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=67, max_seq_len=8)
MICROBATCHES = torch.arange(48).remainder(67).view(3, 2, 8)


def built(args, mode, sharding=None):
    with torch.device("meta"):
        model = Transformer(args)
    plan = Parallelize(ActivationCheckpoint(mode=mode), compile_model=False, sharding=sharding)
    models.get("llama3").parallelize(model, plan)
    if sharding is None:
        give_copies(model, torch.bfloat16)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps(model):
    """Logits, gradients and parameters of two steps of several microbatches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = {}
    for step in range(2):
        optimizer.zero_grad()
        with computing_in_copies(model):
            for number, tokens in enumerate(MICROBATCHES):
                logits = model(tokens)
                (logits.float().square().sum() / 1000).backward()
                seen[step, number] = logits.detach()
        for name, p in model.named_parameters():
            seen[step, "gradient of", plain_name(name)] = whole(p.grad).clone()
        optimizer.step()
        for name, p in model.named_parameters():
            seen[step, plain_name(name)] = whole(p.detach()).clone()
    return seen


def differ(args, mode):
    """What is not the same as by FSDP2."""
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    sharding = FSDPPlan(mesh, torch.bfloat16, torch.float32, reshard=True, cpu_offload=False)
    expected, got = steps(built(args, mode, sharding)), steps(built(args, mode))
    assert got.keys() == expected.keys()
    return [
        key
        for key, value in expected.items()
        if got[key].dtype != value.dtype or not torch.equal(got[key], value)
    ]


@pytest.mark.parametrize(("tied", "mode"), [(False, "none"), (True, "full")])
def test_numbers_are_those_of_fsdp(tied, mode):
    assert ranks.run(1, differ, replace(ARGS, tie_embeddings=tied), mode) == [[]]


def test_parameters_are_back_after_the_scope_and_after_an_error_in_it():
    model = built(ARGS, "none")
    before = dict(model.named_parameters())
    with suppress(KeyError), computing_in_copies(model):
        assert model.output.weight.dtype == torch.bfloat16
        raise KeyError
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
