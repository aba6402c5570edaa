"""Gathered in float8 equals gathered in high precision, bit for bit, and moves a fraction of the bytes.

Each test runs on forked gloo ranks; what differs between runs is compared on the rank itself, so that only
verdicts travel.
"""

from __future__ import annotations

import copy
import io
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, pairwise
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from octavo.float8 import (
    Float8Linear,
    Float8LinearConfig,
    cast_weights_once,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from octavo.float8.carrier import Carrier
from octavo.float8.fsdp import ShardedWeight, sharded_weights
from octavo.float8.quantize import quantize
from octavo.float8.shards import Layout, cast_shard, reduce_maxima, shard_amax
from octavo.float8.tensor_parallel import Float8ColwiseParallel, Float8RowwiseParallel
from tests import ranks
from tests.float8.graphs import FLOAT8, compiles

WORLDS = [1, 2, 3, 4]
RECIPES = ["tensorwise", "tensorwise, powers of two", "blockwise"]

# What FSDP2 says at its first use, once it runs for good.
pytestmark = pytest.mark.filterwarnings("ignore:.*reshard_after_forward=1.*:UserWarning")


def config(recipe: str, *, gather: bool) -> Float8LinearConfig:
    name, _, pow2 = recipe.partition(", ")
    return replace(
        Float8LinearConfig.from_recipe_name(name),
        round_scales_to_power_of_2=bool(pow2),
        enable_fsdp_float8_all_gather=gather,
        emulate=True,
    )


# Sizes that nothing divides; 128-blocks that straddle shards of 192, 96, 64 and 48 rows; fewer rows than
# ranks.
SIZES = (33, 65, 192, 3)


class Block(nn.Module):
    def __init__(self, sizes: tuple[int, ...], *, checkpointed: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, N) for K, N in pairwise(sizes))
        self.checkpointed = checkpointed

    def run(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x).relu()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def build(recipe: str, *, gather: bool, scaled: bool = False, checkpointed: bool = False) -> nn.Module:
    """A chain of linears. `scaled`: rows and columns of the weights times random powers of two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(sizes, checkpointed=checkpointed) for sizes in (SIZES[:3], SIZES[2:])))
    if scaled:
        for linear in linears(model):
            N, K = linear.weight.shape
            linear.weight.data *= 2.0 ** (torch.randint(-6, 6, (N, 1)) + torch.randint(-6, 6, (1, K)))
    return convert_to_float8_training(model, config=config(recipe, gather=gather))


def shard(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = torch.float32,
    reshard: bool | int = True,
    offload: OffloadPolicy | None = None,
) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in [*model, model]:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            offload_policy=offload or OffloadPolicy(),
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo has no average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def step(
    model: nn.Module, optimizer: Any, seed: int, *, once: bool = False, precompute: bool = False
) -> list[Tensor]:
    """One optimizer step of two microbatches: outputs, gradients of inputs, gradients of weights."""
    kept = []
    with cast_weights_once(model) if once else nullcontext():
        for microbatch in range(2):
            g = torch.Generator().manual_seed(1000 * seed + 10 * microbatch + dist.get_rank())
            x = torch.randn(16, SIZES[0], generator=g).requires_grad_()
            y = model(x)
            y.float().square().mean().backward()
            kept += [y.detach(), x.grad]
    kept += [p.grad.full_tensor() for p in model.parameters()]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if precompute:
        precompute_float8_dynamic_scale_for_fsdp(model)
    return kept


def fused(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def train(model: nn.Module, *, steps: int = 2, **how: bool) -> list[Tensor]:
    optimizer = fused(model)
    kept = [t for seed in range(steps) for t in step(model, optimizer, seed, **how)]
    return kept + [p.full_tensor().detach() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -------------------------------------------------------------------------------------- gathered = ungathered


@dataclass(frozen=True)
class Variant:
    """One way to train with a float8 gather, which must not differ from gathering high precision."""

    name: str
    reshard: bool = True
    once: bool = False
    precompute: bool = False
    checkpointed: bool = False


PLAIN = Variant("plain")
ALL_AT_ONCE = Variant("once, precomputed, checkpointed", once=True, precompute=True, checkpointed=True)
EACH = [
    PLAIN,
    Variant("not resharded", reshard=False),
    Variant("precomputed", precompute=True),
    Variant("once", once=True),
    Variant("checkpointed", checkpointed=True),
]
CASES = [
    ("tensorwise", torch.float32, True, [PLAIN, ALL_AT_ONCE]),
    ("tensorwise", torch.bfloat16, True, [PLAIN]),
    ("tensorwise, powers of two", torch.bfloat16, False, [ALL_AT_ONCE]),
    ("blockwise", torch.float32, False, [PLAIN]),
    ("blockwise", torch.bfloat16, True, EACH),
]


def _differing() -> list[str]:
    different = []
    for recipe, dtype, scaled, variants in CASES:
        want = train(shard(build(recipe, gather=False, scaled=scaled), dtype=dtype))
        for v in variants:
            model = build(recipe, gather=True, scaled=scaled, checkpointed=v.checkpointed)
            model = shard(model, dtype=dtype, reshard=v.reshard)
            if not same(train(model, once=v.once, precompute=v.precompute), want):
                different.append(f"{recipe} {dtype}: {v.name}")
            assert len(sharded_weights(model)) == len(SIZES) - 1
    return different


@pytest.mark.parametrize("world", WORLDS)
def test_gathered_equals_ungathered(world: int) -> None:
    assert ranks.run(world, _differing) == [[]] * world


def test_float8_training_is_not_high_precision() -> None:
    """The comparisons above would hold for linears that are not float8 at all."""
    torch.manual_seed(0)
    x = torch.randn(16, SIZES[0])
    float8, high = build("blockwise", gather=True), nn.Sequential(*build("blockwise", gather=True))
    for module in list(high.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Float8Linear):
                plain = nn.Linear(child.in_features, child.out_features)
                plain.load_state_dict(child.state_dict())
                setattr(module, name, plain)
    assert not torch.equal(float8(x), high(x))


# -------------------------------------------------------------------------------------- shards, without ranks


def shards_of(w: Tensor, dim: int, world: int) -> list[Tensor]:
    chunks = list(w.chunk(world, dim))
    return chunks + [w.narrow(dim, 0, 0)] * (world - len(chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("N", "K", "world", "dim"),
    [
        *[(65, 33, world, 0) for world in (1, 2, 3, 4)],
        *[(192 * world, 160, world, 0) for world in (1, 2, 3)],
        *[(rows * 4, 128, 4, 0) for rows in (96, 64, 32)],
        (1000, 300, 3, 0),  # a shard begins inside one block and ends inside another
        (3, 40, 4, 0),  # an empty shard
        (1, 1, 4, 0),
        (40, 192, 2, 1),  # FSDP2 cuts columns only evenly
        (300, 384, 4, 1),
    ],
)
def test_shards_cast_like_the_whole(
    recipe: str, dtype: torch.dtype, N: int, K: int, world: int, dim: int
) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=g)
    w *= 2.0 ** (torch.randint(-6, 6, (N, 1), generator=g) + torch.randint(-6, 6, (1, K), generator=g))
    cast = config(recipe, gather=True).to_recipe().output.b
    layouts = [Layout(N, K, dim, world, rank) for rank in range(world)]
    shards = shards_of(w, dim, world)
    amax = torch.stack([shard_amax(s, at, cast) for s, at in zip(shards, layouts, strict=True)]).amax(0)
    parts = [cast_shard(s.to(dtype), amax, at, cast) for s, at in zip(shards, layouts, strict=True)]
    want = quantize(w.to(dtype), cast)
    gathered = torch.cat([data for data, _ in parts], dim)[:N, :K]
    assert torch.equal(gathered, want.data.contiguous().view(torch.uint8))
    assert all(torch.equal(scale, want.scale) for _, scale in parts)
    assert {tuple(data.shape) for data, _ in parts} == {layouts[0].padded}


def test_maxima_are_reduced_as_numbers() -> None:
    values = torch.tensor([[0.0, 1e-40, 0.5], [torch.inf, torch.nan, -torch.nan]])
    assert ranks.run(2, _reduced, values.tolist()) == [True, True]


def _reduced(values: list[list[float]]) -> bool:
    grids = [torch.tensor(values), torch.tensor([[float(dist.get_rank())]])]
    if dist.get_rank() == 0:
        grids[0].zero_()
    whole, rank = reduce_maxima(grids, [dist.group.WORLD])
    return torch.equal(whole.nan_to_num(-1), torch.tensor(values).nan_to_num(-1)) and rank.item() == 1


# ------------------------------------------------------------------------------ what is communicated and cast


class Traffic(TorchDispatchMode):
    """Counts collectives, the bytes that a rank receives by all-gather, and casts of shards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shards = {weight.shape for _, weight in sharded_weights(model)}
        self.calls: Counter[str] = Counter()
        self.gathered_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            self.calls[name.removeprefix("c10d::").strip("_")] += 1
        if name == "c10d::_allgather_base_":
            self.gathered_bytes += args[0].nbytes
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in FLOAT8 and args[0].dtype not in FLOAT8:
            # A cast in tiles: its last two dimensions needn't be the shard's.
            self.calls["shard casts"] += out.numel() in {shape.numel() for shape in self.shards}
        return out


# Nothing else has as many elements as a shard: neither activations, nor those padded to whole 128-blocks.
SMALL, SMALL_TOKENS = (64, 256, 64, 192), 12
WHOLE_BLOCKS, WHOLE_BLOCKS_TOKENS = (128, 512, 256, 768), 640


def even(
    sizes: tuple[int, ...], cfg: Float8LinearConfig, *, dtype: torch.dtype, checkpointed: bool
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(pair, checkpointed=checkpointed) for pair in pairwise(sizes)))
    for linear in linears(model):
        linear.bias = None
    return shard(convert_to_float8_training(model, config=cfg), dtype=dtype)


def _traffic(
    gather: bool, dtype: torch.dtype, recipe: str, once: bool, precompute: bool, checkpointed: bool
) -> tuple[dict[str, int], int]:
    small = recipe == "tensorwise"
    sizes, tokens = (SMALL, SMALL_TOKENS) if small else (WHOLE_BLOCKS, WHOLE_BLOCKS_TOKENS)
    model = even(sizes, config(recipe, gather=gather), dtype=dtype, checkpointed=checkpointed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def one_step() -> None:
        with cast_weights_once(model) if once else nullcontext():
            for _ in range(3):
                model(torch.randn(tokens, sizes[0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if precompute:
            precompute_float8_dynamic_scale_for_fsdp(model)

    one_step()
    with Traffic(model) as traffic:
        one_step()
    return dict(traffic.calls), traffic.gathered_bytes


def _all_traffic() -> dict[str, Any]:
    fp32, bf16 = torch.float32, torch.bfloat16
    return {
        "fp32": _traffic(False, fp32, "tensorwise", False, False, False),
        "bf16": _traffic(False, bf16, "tensorwise", False, False, False),
        "float8": _traffic(True, bf16, "tensorwise", False, False, False),
        "float8 from fp32": _traffic(True, fp32, "tensorwise", False, False, False),
        "precomputed": _traffic(True, bf16, "tensorwise", False, True, False),
        "once": _traffic(True, bf16, "tensorwise", True, False, False),
        "all": _traffic(True, bf16, "tensorwise", True, True, True),
        "all, blockwise": _traffic(True, bf16, "blockwise", True, True, True),
    }


def test_bytes_reductions_and_casts_of_a_step() -> None:
    first, second = ranks.run(2, _all_traffic)
    assert first == second
    # 3 microbatches, each gathering 3 weights in forward and 3 in backward.
    gathers = 3 * (3 + 3)
    calls = {name: Counter(counts) for name, (counts, _) in first.items()}
    received = {name: total for name, (_, total) in first.items()}
    elements = gathers * sum(K * N for K, N in pairwise(SMALL)) // 3
    assert all(counts["allgather_base"] == gathers for counts in calls.values())
    assert received["fp32"] == 4 * elements
    assert received["bf16"] == 2 * elements
    for name in set(calls) - {"fp32", "bf16", "all, blockwise"}:
        assert received[name] == elements, name

    def reductions_and_casts(name: str) -> tuple[int, int]:
        return calls[name]["allreduce"], calls[name]["shard casts"]

    assert reductions_and_casts("fp32") == (0, 0)
    assert reductions_and_casts("float8") == (gathers, gathers)
    assert reductions_and_casts("precomputed") == (1, gathers)
    assert reductions_and_casts("once") == (1, 3)
    assert reductions_and_casts("all") == (1, 3)
    assert reductions_and_casts("all, blockwise") == (1, 3)


# ----------------------------------------------------------------------------------------------- stale scales


def reshard_all(*models: nn.Module) -> None:
    """What backward does at its end."""
    for module in chain(*(model.modules() for model in models)):
        if isinstance(module, FSDPModule):
            module.reshard()


def _without_precompute_after_a_step() -> list[bool]:
    verdicts = []
    want = train(shard(build("blockwise", gather=True)), steps=3)
    model = shard(build("blockwise", gather=True))
    precompute_float8_dynamic_scale_for_fsdp(model)  # and never again
    verdicts.append(same(train(model, steps=3), want))

    # Written by hand, by state dict, by .data: each time the next gather must see it.
    def writes(model: nn.Module) -> list[Any]:
        parameters = [p for p in model.parameters() if p.dim() == 2]
        doubled = {name: value * 2 for name, value in model.state_dict().items()}
        return [
            lambda: [torch.no_grad()(p.mul_)(3) for p in parameters],
            lambda: [p.data.mul_(0.25) for p in parameters],
            lambda: [p.detach().add_(1) for p in parameters],
            lambda: model.load_state_dict(doubled),
            lambda: torch._foreach_mul_([p.detach() for p in parameters], 8.0),
            lambda: torch._foreach_copy_(
                [p.to_local().detach() for p in parameters],
                [torch.ones_like(p.to_local()) * 5 for p in parameters],
            ),
        ]

    x = torch.randn(4, SIZES[0], generator=torch.Generator().manual_seed(0))
    model, other = shard(build("blockwise", gather=True)), shard(build("blockwise", gather=False))
    for write, write_other in zip(writes(model), writes(other), strict=True):
        precompute_float8_dynamic_scale_for_fsdp(model)
        write()
        write_other()
        with torch.no_grad():
            verdicts.append(torch.equal(model(x), other(x)))
        reshard_all(model, other)

    with cast_weights_once(model), torch.no_grad():  # by hand, among a step's microbatches
        for factor in (1.0, 3.0):
            for m in (model, other):
                for p in m.parameters():
                    p.mul_(factor)
            verdicts.append(torch.equal(model(x), other(x)))
            reshard_all(model, other)

    precompute_float8_dynamic_scale_for_fsdp(model)
    for _, weight in sharded_weights(model):
        weight.plain.mul_(2)
    try:
        model(x)
    except RuntimeError as error:
        verdicts.append("through an alias" in str(error))
    precompute_float8_dynamic_scale_for_fsdp(model)
    model(x)
    return verdicts


def test_scales_are_never_older_than_the_weights() -> None:
    verdicts = ranks.run(2, _without_precompute_after_a_step)
    assert verdicts == [[True] * 10] * 2


# ------------------------------------------------------------------------------------- everything stays plain


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

    # torch.save of what belongs to one rank, loaded by who knows torch alone.
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


# ----------------------------------------------------------------------------------------------- other meshes


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
    """The gathered parts of a tensor parallel weight, against casts of those parts with the scales of the
    whole.
    """
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
            assert isinstance(carrier, Carrier)
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


# -------------------------------------------------------------------------------------------------- odd cases


def _message(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _resharded_to_fewer() -> str:
    model = shard(build("tensorwise", gather=True), reshard=2)
    return _message(lambda: model(torch.randn(4, SIZES[0])))


def test_resharding_to_fewer_ranks_is_refused() -> None:
    for message in ranks.run(4, _resharded_to_fewer):
        assert message.startswith("ValueError: reshard_after_forward is a number of ranks")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.output = nn.Linear(32, 48, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens))


def _tied() -> bool:
    results = []
    for gather in (False, True):
        torch.manual_seed(0)
        model = convert_to_float8_training(Tied(), config=config("tensorwise", gather=gather))
        fully_shard(model)
        optimizer = fused(model)
        for _ in range(2):
            model(torch.arange(12)).sum().backward()
            optimizer.step()
        results.append([model.embedding.weight.full_tensor(), model.embedding.weight.grad.full_tensor()])
        assert model.embedding.weight is model.output.weight
    return same(*results)


@pytest.mark.filterwarnings("ignore:.*view tensor.*:UserWarning")
def test_tied_weights_stay_tied_and_are_gathered_whole() -> None:
    assert ranks.run(2, _tied) == [True, True]


def _odd_policies() -> list[bool]:
    def results(gather: bool) -> list[list[Tensor]]:
        # With fewer than 16 tokens, the order in which emulation's products are summed depends on strides.
        x = torch.randn(16, SIZES[0], generator=torch.Generator().manual_seed(0))
        half = build("tensorwise", gather=gather)
        linears(half)[0].weight.requires_grad_(False)
        half = shard(half, dtype=torch.float16)
        autocast = shard(build("tensorwise", gather=gather), dtype=None)
        offloaded = shard(build("blockwise", gather=gather), offload=CPUOffloadPolicy(pin_memory=False))
        precompute_float8_dynamic_scale_for_fsdp(offloaded)
        kept = []
        for model in (half, autocast, offloaded):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model is autocast):
                y = model(x)
            y.sum().backward()
            grads = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
            kept.append([y.detach(), *grads])
        assert [len(k) for k in kept] == [6, 7, 7]
        assert [k[0].dtype for k in kept] == [torch.float16, torch.bfloat16, torch.float32]
        return kept

    return [same(a, b) for a, b in zip(results(True), results(False), strict=True)]


def test_half_precision_frozen_autocast_and_offloaded() -> None:
    assert ranks.run(2, _odd_policies) == [[True] * 3] * 2


def _copied() -> list[bool]:
    model = shard(build("tensorwise", gather=True))
    precompute_float8_dynamic_scale_for_fsdp(model)
    p, weight = sharded_weights(model)[0]
    copied = copy.deepcopy(p)
    with torch.no_grad():
        copied.mul_(2)
    return [torch.equal(copied.full_tensor(), 2 * p.full_tensor()), weight.known.amax is not None]


def test_a_copy_of_a_parameter_is_its_own() -> None:
    assert ranks.run(2, _copied) == [[True, True]] * 2
    model = copy.deepcopy(build("tensorwise", gather=True))
    assert all(type(linear.weight) is nn.Parameter for linear in linears(model))


def _not_a_number() -> list[bool]:
    verdicts = []
    for bad in (torch.nan, torch.inf):
        for precompute in (False, True):
            model = shard(build("blockwise", gather=True))
            with torch.no_grad():
                for p, weight in sharded_weights(model):
                    if dist.get_rank() == 0 and p.shape[0] == SIZES[2]:
                        weight[0, 0] = bad
            if precompute:
                precompute_float8_dynamic_scale_for_fsdp(model)
            verdicts.append(not model(torch.randn(4, SIZES[0])).isfinite().all().item())
    return verdicts


def test_bad_numbers_are_seen_on_every_rank() -> None:
    assert ranks.run(2, _not_a_number) == [[True] * 4] * 2


# --------------------------------------------------------------------------------------------------- compiled


def _compiled() -> list[str]:
    """A block compiled in one graph, then sharded; against the same in eager mode."""
    runs: dict[str, list[Tensor]] = {}
    for name in ("eager", "compiled", "compiled, once"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(Block((64, 192, 64), checkpointed=False))
        convert_to_float8_training(model, config=config("tensorwise", gather=True))
        if name != "eager":
            model[0].compile(fullgraph=True)
        shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        runs[name] = []
        for seed in range(2):
            with cast_weights_once(model) if name == "compiled, once" else nullcontext():
                for microbatch in range(2):
                    g = torch.Generator().manual_seed(10 * seed + microbatch)
                    x = torch.randn(32, 64, generator=g).requires_grad_()
                    y = model(x)
                    y.square().mean().backward()
                    runs[name] += [y.detach(), x.grad]
            optimizer.step()
            optimizer.zero_grad()
        runs[name] += [p.full_tensor().detach() for p in model.parameters()]
        assert any(isinstance(state, ShardedWeight) for _, state in sharded_weights(model))
    return [name for name, kept in runs.items() if not same(kept, runs["eager"])]


@compiles
def test_compiled_block_equals_the_eager_one() -> None:
    assert ranks.run(2, _compiled, timeout=300) == [[], []]
