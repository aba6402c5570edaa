"""Under FSDP2 states are plain tensors, on any mesh."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from octavo.float8 import (
    Float8Linear,
    cast_weights_once,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from octavo.float8.distributed.fsdp_gather import sharded_weights
from octavo.float8.distributed.parallel_styles import Float8ColwiseParallel, Float8RowwiseParallel
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.quantize import quantize
from tests.float8.distributed.sharded import (
    SIZES,
    Block,
    build,
    config,
    fused,
    ignore_fsdp_warning,
    linears,
    same,
    shard,
    step,
    train,
)
from tests.helpers import ranks

pytestmark = ignore_fsdp_warning


def _is_plain(tensor: Any) -> bool:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return type(local) is Tensor


def _state_dicts(folder: str) -> dict[str, bool]:
    model = shard(build("tensorwise", gather=True))
    optimizer = fused(model)
    step(model, optimizer, 0)
    verdicts = {}

    state = model.state_dict()
    verdicts["keys"] = set(state) == set(build("tensorwise", gather=False).state_dict())
    verdicts["plain"] = all(map(_is_plain, state.values()))
    verdicts["same storage"] = all(
        v._local_tensor.data_ptr() == p._local_tensor.plain.data_ptr()
        for v, (p, _) in zip([v for v in state.values() if v.dim() == 2], sharded_weights(model), strict=True)
    )
    moments = [t for s in optimizer.state.values() for t in s.values()]
    verdicts["optimizer plain"] = all(map(_is_plain, moments))
    optimizer_state = get_optimizer_state_dict(model, optimizer)
    verdicts["optimizer state dict plain"] = all(
        map(_is_plain, [t for s in optimizer_state["state"].values() for t in s.values()])
    )
    verdicts["gradients plain"] = True
    model(torch.randn(4, SIZES[0])).sum().backward()
    verdicts["gradients plain"] = all(_is_plain(p.grad) for p in model.parameters())

    # torch.save of one rank's tensors, loaded without octavo's classes.
    for name, value in (("state dict", state), ("parameter", dict(model.named_parameters()))):
        file = io.BytesIO()
        torch.save({k: v.to_local() for k, v in value.items()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        verdicts[f"torch.save of {name}"] = all(
            type(t) is Tensor or isinstance(t, nn.Parameter) for t in loaded.values()
        )

    # Whole, into a bfloat16 model without octavo; and back.
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    full = {k: v.clone() for k, v in full.items()}
    objects = [full]
    dist.broadcast_object_list(objects, src=0)
    full = objects[0]
    plain = nn.Sequential(*(Block(s, checkpointed=False) for s in (SIZES[:3], SIZES[2:]))).bfloat16()
    plain.load_state_dict(full)
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    verdicts["into bfloat16"] = all(
        torch.equal(v, whole[k].bfloat16()) for k, v in plain.state_dict().items()
    )
    back = shard(build("tensorwise", gather=True, scaled=True))
    precompute_float8_dynamic_scale_for_fsdp(back)
    set_model_state_dict(back, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    reference = build("tensorwise", gather=False)
    reference.load_state_dict(plain.state_dict())
    x = torch.randn(4, SIZES[0], generator=torch.Generator().manual_seed(0))
    verdicts["and back"] = torch.equal(back(x), shard(reference)(x))

    # DCP, sharded, into a model that gathers in high precision, and into a whole one.
    dcp.save({"model": get_model_state_dict(model), "optimizer": optimizer_state}, checkpoint_id=folder)
    for gather in (False, True):
        other = shard(build("tensorwise", gather=gather, scaled=True))
        if gather:
            precompute_float8_dynamic_scale_for_fsdp(other)
        into = get_model_state_dict(other)
        dcp.load({"model": into}, checkpoint_id=folder)
        set_model_state_dict(other, into)
        verdicts[f"DCP, gather={gather}"] = torch.equal(other(x), model(x))

    assigned = shard(build("tensorwise", gather=True, scaled=True))
    assigned.load_state_dict(model.state_dict(), assign=True)
    verdicts["assigned"] = torch.equal(assigned(x), model(x)) and len(sharded_weights(assigned)) == 3
    return verdicts


def test_state_dicts_are_plain(tmp_path: Any) -> None:
    for verdicts in ranks.run(3, _state_dicts, str(tmp_path)):
        assert verdicts == dict.fromkeys(verdicts, True)
        assert len(verdicts) == 13


def _meta_init() -> list[bool]:
    verdicts = []
    results = []
    for gather in (False, True):
        filled = build("blockwise", gather=gather)
        with torch.device("meta"):
            model = nn.Sequential(*(Block(s, checkpointed=False) for s in (SIZES[:3], SIZES[2:])))
        convert_to_float8_training(model, config=config("blockwise", gather=gather))
        shard(model, dtype=torch.bfloat16).to_empty(device="cpu")
        with torch.no_grad():
            for p, value in zip(model.parameters(), filled.parameters(), strict=True):
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None))
        state = model.state_dict()  # taken before the first forward, it must follow
        results.append(train(model))
        verdicts.append(
            all(torch.equal(state[n].full_tensor(), p.full_tensor()) for n, p in model.named_parameters())
        )
        verdicts.append(len(sharded_weights(model)) == (3 if gather else 0))
    return [*verdicts, same(*results)]


def test_built_on_meta_then_filled() -> None:
    assert ranks.run(3, _meta_init) == [[True] * 5] * 3


def _converted_too_late() -> list[str]:
    messages = []
    for gather in (False, True):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        for part in (*model, model):
            fully_shard(part)
        with pytest.raises(ValueError) as caught:
            convert_to_float8_training(model, config=config("tensorwise", gather=gather))
        messages.append(str(caught.value))
    return messages


def test_converting_what_is_sharded_is_refused() -> None:
    message = "0 is sharded already: convert first, and apply fully_shard to the converted model"
    assert ranks.run(2, _converted_too_late) == [[message] * 2] * 2


def _hsdp() -> bool:
    results = []
    for gather in (False, True):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results.append(train(shard(build("blockwise", gather=gather), mesh=mesh), precompute=gather))
    return same(*results)


def _columns() -> bool:
    results = []
    for gather in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Block((130, 260, 64), checkpointed=False))
        for linear in linears(model):
            linear.bias = None
        convert_to_float8_training(model, config=config("blockwise", gather=gather))
        fully_shard(model, shard_placement_fn=lambda p: Shard(1))
        model.set_force_sum_reduction_for_comms(True)
        optimizer = fused(model)
        kept = []
        for seed in range(3):
            y = model(torch.randn(8, 130, generator=torch.Generator().manual_seed(seed)))
            y.square().mean().backward()
            kept.append(y.detach())
            optimizer.step()
            optimizer.zero_grad()
            if seed == 0:
                precompute_float8_dynamic_scale_for_fsdp(model)
        results.append(kept + [p.full_tensor().detach() for p in model.parameters()])
    return same(*results)


def test_weights_sharded_by_columns() -> None:
    assert ranks.run(2, _columns) == [True, True]


def test_replicated_groups_of_shards() -> None:
    assert ranks.run(4, _hsdp) == [True] * 4


def _tensor_parallel(recipe: str) -> list[bool]:
    """Gathered shards of a tensor parallel weight equal casts of those shards with the whole's scales."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    verdicts = []
    for style, axis in ((ColwiseParallel(), 0), (RowwiseParallel(), 1)):
        torch.manual_seed(0)
        # Without tensorwise's one scale, a block is one of the part: 96 rows begin inside no block of it.
        linear = nn.Linear(192, 384, bias=False)
        w = linear.weight.detach().clone()
        w[-1, -1] = 100.0  # lies on the last rank of both axes
        model = nn.Sequential(linear)
        parallelize_module(model, mesh["tensor"], {"0": style})
        convert = Float8Linear.from_float(model[0], config(recipe, gather=True))
        model[0] = convert
        fully_shard(model, mesh=mesh["data"])
        for precompute in (False, True, True):
            if precompute:
                precompute_float8_dynamic_scale_for_fsdp(model)
            with torch.no_grad():
                model[0].weight.copy_(distribute_like(w, model[0].weight))
            if precompute:
                precompute_float8_dynamic_scale_for_fsdp(model)
            model.unshard()
            carrier = model[0].weight._local_tensor
            part = w.chunk(2, axis)[mesh.get_local_rank("tensor")]
            cast = carrier.cast
            assert isinstance(carrier, UnshardedWeight)
            if recipe == "tensorwise":
                want = quantize(w, cast)
                data, scale = want.data.chunk(2, axis)[mesh.get_local_rank("tensor")], want.scale
            else:
                data, scale = quantize(part, cast)
            verdicts.append(
                torch.equal(carrier.data_fp8.view(torch.uint8), data.contiguous().view(torch.uint8))
                and torch.equal(carrier.scale, scale)
            )
            model.reshard()
    return verdicts


def distribute_like(w: Tensor, p: DTensor) -> DTensor:
    """`w`, first cut as tensor parallel cuts `p`, then as FSDP2 does."""
    mesh = p.device_mesh
    part = w.chunk(mesh.size(1), p.placements[1].dim)[mesh.get_local_rank(1)]
    local = part.chunk(mesh.size(0), 0)[mesh.get_local_rank(0)].contiguous()
    return DTensor.from_local(local, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _tensor_parallel_steps() -> list[bool]:
    results = []
    for gather, once in ((False, False), (True, False), (True, True)):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        torch.manual_seed(0)
        model = nn.Sequential(Block((64, 192, 64), checkpointed=False))
        for linear in linears(model):
            linear.bias = None
        convert_to_float8_training(model, config=config("tensorwise", gather=gather))
        plan = {"0.linears.0": Float8ColwiseParallel(), "0.linears.1": Float8RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        shard(model, mesh=mesh["data"], dtype=torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = []
        for seed in range(2):
            with cast_weights_once(model, enabled=once):
                for microbatch in range(2):
                    g = torch.Generator().manual_seed(
                        10 * seed + microbatch + 100 * mesh.get_local_rank("data")
                    )
                    y = model(torch.randn(32, 64, generator=g))
                    y.square().mean().backward()
                    kept.append(y.detach())
            optimizer.step()
            optimizer.zero_grad()
            precompute_float8_dynamic_scale_for_fsdp(model)
        results.append(kept + [p.full_tensor().detach() for p in model.parameters()])
        assert len(sharded_weights(model)) == 2 * gather
    return [same(results[0], other) for other in results[1:]]


def test_tensor_parallel_linears_gathered_in_float8() -> None:
    assert ranks.run(4, _tensor_parallel_steps) == [[True, True]] * 4


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_maxima_over_tensor_parallel_ranks_too(recipe: str) -> None:
    assert ranks.run(4, _tensor_parallel, recipe) == [[True] * 6] * 4
