"""Bytes on the wire, counted and as they must be."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import traffic
from octavo import models
from octavo.config.schema import ActivationCheckpoint
from octavo.distributed.ddp import reduce_gradients_now
from octavo.distributed.parallelize_plan import FSDPPlan, Parallelize, Replicas
from octavo.distributed.traffic import Traffic
from octavo.families import ModelArgs
from octavo.models.init import init_weights
from octavo.models.transformer import Transformer
from tests.helpers import ranks

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=64, max_seq_len=8)


def collectives():
    """Each one on 1,000 bytes: what this rank sends."""
    x, found = torch.zeros(250), {}
    n = dist.get_world_size()
    group = dist.group.WORLD.group_name
    functional = torch.ops._c10d_functional
    for name, call in {
        "all-gather": lambda: dist.all_gather_into_tensor(x.new_empty(n * 250), x),
        "all-gather, list": lambda: dist.all_gather([x.clone() for _ in range(n)], x),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(x.clone(), x.new_zeros(n * 250)),
        "all-reduce": lambda: dist.all_reduce(x),
        "all-to-all": lambda: dist.all_to_all_single(x.new_empty(n * 250), x.new_zeros(n * 250)),
        "functional all-gather": lambda: functional.all_gather_into_tensor(x, n, group),
        "functional all-reduce": lambda: functional.all_reduce(x, "sum", group),
        "functional reduce-scatter": lambda: functional.reduce_scatter_tensor(
            x.new_zeros(n * 250), "sum", n, group
        ),
        "functional all-to-all": lambda: functional.all_to_all_single(
            x.new_zeros(n * 250), [250] * n, [250] * n, group
        ),
        "barrier": dist.barrier,
    }.items():
        with Traffic() as counted:
            out = call()
        if isinstance(out, torch.Tensor):
            functional.wait_tensor(out)
        found[name] = counted.total
    return found


@pytest.mark.filterwarnings("ignore:.* is deprecated. Please use:FutureWarning")  # in later torch
def test_every_collective_is_counted_as_a_ring_sends_it():
    for found in ranks.run(4, collectives):
        assert found.pop("barrier") == 0
        assert found.pop("all-reduce") == found.pop("functional all-reduce") == 1500
        assert set(found.values()) == {3000}, found


def step(reshard, param_dtype, microbatches):
    """What the gradients of one step send: bytes by kind, and all-gathers."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_replicate",))
    sharding = replicas = None
    if reshard is None:
        replicas = Replicas(mesh["dp_replicate"], torch.float32)
    else:
        sharding = FSDPPlan(
            mesh=mesh,
            param_dtype=param_dtype,
            reduce_dtype=torch.float32,
            reshard=reshard != "never",
            reshard_last=reshard == "always",
            cpu_offload=False,
        )
    with torch.device("meta"):
        model = Transformer(ARGS)
    plan = Parallelize(ActivationCheckpoint(mode="none"), False, sharding, replicas=replicas)
    models.get("llama3").parallelize(model, plan)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    tokens = torch.arange(16).view(2, 8)
    for _ in range(2):  # what is made at the first use is not counted
        with Traffic() as counted:
            for number in range(microbatches):
                reduce_gradients_now(model, last=number == microbatches - 1)
                model(tokens).sum().backward()
    gathers = sum(times for name, times in counted.calls.items() if "gather" in name)
    return dict(counted.sent), gathers


SIZE = sum(p.numel() for p in Transformer(ARGS).parameters())
LAST = ARGS.dim + ARGS.dim * ARGS.vocab_size  # norm and output


@pytest.mark.parametrize(
    ("reshard", "gathered", "gathers"),
    [("never", SIZE, 4), ("default", 2 * SIZE - LAST, 7), ("always", 2 * SIZE, 8)],
)
def test_when_gathered_weights_are_freed_shows_in_the_gathers(reshard, gathered, gathers):
    for dtype in (torch.float32, torch.bfloat16):
        for sent, calls in ranks.run(2, step, reshard, dtype, 1):
            assert calls == gathers
            assert sent["weights"] == gathered * dtype.itemsize // 2
            assert sent["gradients"] == SIZE * 4 // 2


def test_replicas_reduce_their_gradients_once_a_step():
    for sent, gathers in ranks.run(2, step, None, torch.float32, 3):
        assert gathers == 0
        assert sent["gradients"] == 2 * (2 - 1) * SIZE * 4 // 2
        assert "weights" not in sent


def test_float8_gathers_send_one_byte_a_weight():
    """The debug model, trained: layers' linears in one byte, the rest in bfloat16's two."""
    sent = traffic.measure("FSDP 2", "tensorwise", seq_len=32)
    layers = 6 * (4 * 256 * 256 + 3 * 256 * 768)
    last = 256 + 2048 * 256  # norm and output, which backward begins with
    rest = 2048 * 256 + 12 * 256 + last
    flags = 12  # whether to stop, before the first step; the loss, and whether to stop: three floats
    scales = 6 * 7 * 4  # one reduction of all weights' maxima, counted as activations
    assert sent == {
        "weights": (1 * 2 * layers + 2 * (2 * rest - last)) // 2,
        "gradients": 4 * (layers + rest) // 2 + flags,
        "activations": scales,
    }
