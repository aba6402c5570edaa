"""Tensor parallel linears compute what one process would, and their tokens travel in float8.

Every test feeds a fixed gradient: one ulp in an output would flip roundings of what is computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.float8 import (
    RECIPES,
    Float8Linear,
    Float8LinearConfig,
    cast_weights_once,
    convert_to_float8_training,
)
from octavo.float8.distributed.parallel_styles import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from octavo.float8.distributed.tp_gather import GatheredInput
from octavo.float8.quantize import quantize
from tests.float8.graphs import WITHOUT_CODE, compiles
from tests.float8.torchao_reference import relative
from tests.helpers import ranks

pytestmark = pytest.mark.usefixtures("products_in_float32")

B, S, K, N = 2, 256, 512, 512  # 128-blocks of features fit on four ranks, of tokens on two
CLOSE = 1e-5  # norm-relative, against one process
KINDS = ("colwise", "rowwise", "shared")


def uneven(*shape: int, seed: int) -> Tensor:
    """Normal numbers whose rows and columns have scales of their own, so that no two parts share maxima."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    for dim in range(len(shape)):
        along = [1] * len(shape)
        along[dim] = shape[dim]
        x = x * 2.0 ** torch.randint(-2, 3, along, generator=g)
    return x


class Two(nn.Module):
    """Linears with one input: what wq, wk and wv are to attention."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(K, N, bias=bias)
        self.b = nn.Linear(K, N, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * 2 + self.b(x)


class Block(nn.Module):
    """A pair of column-wise linears and a row-wise one, with a residual: sequence parallel at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(K, N, bias=False)
        self.w2 = nn.Linear(N, K)
        self.w3 = nn.Linear(K, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.relu(self.w1(x)) * self.w3(x))


def build(
    kind: str,
    recipe: str | None,
    emulate: bool | None = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """A model, the same on every rank; recipe None is high precision."""
    model = {"shared": Two, "block": Block}.get(kind, lambda: nn.Sequential(nn.Linear(K, N)))()
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(uneven(*p.shape, seed=seed) / 16)
    if recipe is not None:
        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, **options)
        convert_to_float8_training(model, config=config)
    return model.to(dtype)


@dataclass(frozen=True)
class Styles:
    """Ours, or torch's, which work on a Float8Linear too and gather in high precision."""

    colwise: Any = Float8ColwiseParallel
    rowwise: Any = Float8RowwiseParallel
    prepare: Any = PrepareFloat8ModuleInput

    def plan(self, kind: str, sequence: bool) -> dict[str, Any]:
        tokens = Shard(1) if sequence else Replicate()
        one_gather = self.prepare(input_layouts=tokens, desired_input_layouts=Replicate())
        if kind == "colwise":
            return {"0": self.colwise(input_layouts=tokens)}
        if kind == "rowwise":
            return {"0": self.rowwise(output_layouts=tokens)}
        if kind == "shared":
            return {"": one_gather, "a": self.colwise(), "b": self.colwise()}
        return {
            "inner": one_gather,
            "inner.w1": self.colwise(),
            "inner.w3": self.colwise(),
            "inner.w2": self.rowwise(output_layouts=tokens),
        }


OURS, TORCHS = Styles(), Styles(ColwiseParallel, RowwiseParallel, PrepareModuleInput)


def layouts(kind: str, sequence: bool) -> tuple[Any, Any]:
    """How the input and the output of a model are sharded."""
    tokens = Shard(1) if sequence else Replicate()
    return Shard(2) if kind == "rowwise" else tokens, tokens if kind in ("rowwise", "block") else Shard(2)


def tp_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@cache
def one_process(
    kind: str, recipe: str, emulate: bool | None, dtype: torch.dtype, tokens: int
) -> dict[str, Tensor]:
    """The output of one process, and its gradients, by name."""
    model, (x, dy) = build(kind, recipe, emulate, dtype), batch(dtype, tokens)
    y = model(x.requires_grad_())
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def batch(dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """The input and the gradient of the output."""
    return uneven(B, tokens, K, seed=10).to(dtype), uneven(B, tokens, N, seed=11).to(dtype)


def errors(
    kind: str,
    recipe: str,
    *,
    sequence: bool = True,
    emulate: bool | None = True,
    compiled: bool | str = False,
    cached: bool = False,
    dtype: torch.dtype = torch.float32,
    styles: Styles = OURS,
    tokens: int = S,
    as_dtensor: bool = False,
) -> dict[str, float]:
    """Distance of the output and of every gradient from one process's, by name.

    `compiled`: into graphs without code; "inductor": on one rank into code.
    """
    wanted = one_process(kind, recipe, emulate, dtype, tokens)
    model, (x, dy) = build(kind, recipe, emulate, dtype), batch(dtype, tokens)
    backend = compiled if compiled == "inductor" and dist.get_rank() == 0 else WITHOUT_CODE
    mesh = tp_mesh()
    parallelize_module(model, mesh, styles.plan(kind, sequence))
    before, after = layouts(kind, sequence)
    part = distribute_tensor(x, mesh, [before])
    part = (part if as_dtensor else part.to_local().clone()).detach().requires_grad_()
    with cast_weights_once(model, enabled=cached):
        assert not cached or all(m.weight_cache.casts for m in model.modules() if isinstance(m, Float8Linear))
        y = (torch.compile(model, fullgraph=True, backend=backend) if compiled else model)(part)
        y.backward(distribute_tensor(dy, mesh, [after]).to_local())

    def whole(x: Tensor, layout: Any) -> Tensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [layout], run_check=False)
        return x.full_tensor()

    found = {
        "y": relative(whole(y.detach(), after), wanted["y"]),
        "dx": relative(whole(part.grad, before), wanted["dx"]),
    }
    for name, p in model.named_parameters():
        found[name] = relative(p.grad.full_tensor(), wanted[name])
    return found


def all_errors(cases: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, float]]:
    return [errors(kind, recipe, **options) for kind, recipe, options in cases]


def check(world: int, cases: list[tuple[str, str, dict[str, Any]]]) -> None:
    for kind, recipe, options in cases:  # once, for all ranks, which are forked
        emulate, tokens = options.get("emulate", True), options.get("tokens", S)
        one_process(kind, recipe, emulate, torch.float32, tokens)
    for by_case in ranks.run(world, all_errors, cases):
        far = {
            (*case[:2], name): error
            for case, found in zip(cases, by_case, strict=True)
            for name, error in found.items()
            if not error < CLOSE
        }
        assert not far


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world: int, recipe: str) -> None:
    check(world, [(kind, recipe, {"sequence": sequence}) for kind in KINDS for sequence in (False, True)])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_a_whole_block_equals_one_process(recipe: str) -> None:
    check(2, [("block", recipe, {"sequence": sequence}) for sequence in (False, True)])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_the_hardware_path_equals_one_process(recipe: str) -> None:
    check(2, [(kind, recipe, {"emulate": False}) for kind in KINDS])


@compiles
@pytest.mark.parametrize("compiled", [True, pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("colwise", "tensorwise"),
        pytest.param("rowwise", "rowwise", marks=pytest.mark.slow),  # minutes of compiling
        pytest.param("block", "tensorwise", marks=pytest.mark.slow),
        pytest.param("block", "rowwise", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_one_process(kind: str, recipe: str, compiled: bool | str) -> None:
    check(2, [(kind, recipe, {"compiled": compiled})])


@pytest.mark.parametrize("recipe", RECIPES)
def test_torchs_own_styles_give_the_same(recipe: str) -> None:
    check(2, [(kind, recipe, {"styles": TORCHS}) for kind in KINDS])


def test_weights_cast_once_give_the_same() -> None:
    check(2, [(kind, recipe, {"cached": True}) for recipe in ("tensorwise", "rowwise") for kind in KINDS])


def test_tokens_that_do_not_divide_evenly() -> None:
    """A DTensor has the whole size, so such tokens are gathered in high precision."""
    options = {"tokens": 255, "as_dtensor": True}
    check(
        2, [(kind, recipe, options) for recipe in ("tensorwise", "rowwise") for kind in ("colwise", "shared")]
    )


def test_bfloat16() -> None:
    """Exact but for sums over ranks, which bfloat16 rounds once more."""
    cases: list[Any] = [(kind, "tensorwise", {"dtype": torch.bfloat16}) for kind in KINDS]
    for colwise, rowwise, shared in ranks.run(2, all_errors, cases):
        for found in (colwise, shared):
            assert 0 < found.pop("dx") < 5e-3
        assert 0 < rowwise.pop("y") < 5e-3
        assert rowwise.pop("0.bias") < 5e-3
        assert {*colwise.values(), *shared.values(), *rowwise.values()} == {0.0}


# ------------------------------------------------------------------------------------------- what travels


class Traffic(TorchDispatchMode):
    """The collectives that run: (name, dtype, bytes handed in by this rank), scalars left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func.name() and args[0].numel() > 1:
            name = func.name().split("::")[1].split(".")[0]
            self.calls.append((name, args[0].dtype, args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))

    def bytes_of(self, name: str) -> list[int]:
        return [size for called, _, size in self.calls if called == name]


GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


def traffic(kind: str, recipe: str | None, frozen: bool = False) -> tuple[Traffic, Traffic]:
    """What travels in forward and in backward of a bfloat16 model with sequence parallel."""
    model = build(kind, recipe, dtype=torch.bfloat16)
    model.requires_grad_(not frozen)
    parallelize_module(model, tp_mesh(), (TORCHS if recipe is None else OURS).plan(kind, True))
    shape = (B, S, K // 2) if kind == "rowwise" else (B, S // 2, K)
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    with Traffic() as forward:
        y = model(x)
    with Traffic() as backward:
        y.backward(torch.randn_like(y))
    return forward, backward


def test_one_gather_in_float8_serves_all_linears() -> None:
    elements = B * S // 2 * K
    for forward, backward in ranks.run(2, traffic, "shared", "tensorwise"):
        assert forward.calls == [(GATHER, torch.uint8, elements)]
        # The gradient of the whole input goes back as one sum, in high precision.
        assert backward.bytes_of(SCATTER) == [2 * 2 * elements]
        assert backward.bytes_of(GATHER) == []


def test_float8_gathers_are_half_of_bfloat16s() -> None:
    for kind, which in (("shared", 0), ("colwise", 0), ("rowwise", 1)):
        ours, plain = (ranks.run(2, traffic, kind, recipe)[0][which] for recipe in ("tensorwise", None))
        assert sum(ours.bytes_of(GATHER)) * 2 == sum(plain.bytes_of(GATHER)) > 0


def test_scales_of_rows_travel_along() -> None:
    rows = B * S // 2
    one_form = rows * K + 4 * rows
    (forward, _), _ = ranks.run(2, traffic, "shared", "rowwise", True)
    assert forward.bytes_of(GATHER) == [one_form]
    # A weight that is trained needs the columns' form, too, whose scales need no gather.
    (forward, _), _ = ranks.run(2, traffic, "shared", "rowwise", False)
    assert forward.bytes_of(GATHER) == [one_form + rows * K]
    assert forward.bytes_of("all_reduce") == [4 * K]


def gathered_nan(recipe: str) -> list[int]:
    """How many outputs are NaN where one token of the last rank holds one, on every rank."""
    model = build("colwise", recipe)
    parallelize_module(model, tp_mesh(), OURS.plan("colwise", True))
    x = torch.ones(1, 4, K)
    if dist.get_rank() == 1:
        x[0, 2, 7] = torch.nan
    y = model(x)
    return [int(y[0, token].isnan().sum()) for token in range(8)]


def test_a_nan_is_seen_by_all_that_share_its_scale() -> None:
    half = N // 2
    for counts in ranks.run(2, gathered_nan, "rowwise"):
        assert counts == [0, 0, 0, 0, 0, 0, half, 0]
    for counts in ranks.run(2, gathered_nan, "tensorwise"):
        assert counts == [half] * 8


# ----------------------------------------------------------------------------------- with FSDP2; state dicts


def two_dimensional(recipe: str, float8_gather: bool, once: bool) -> dict[str, float]:
    """2 x 2 ranks: FSDP2 over groups of two, each of which shares a batch by tensor parallelism.

    `once`: in a scope that casts weights once, entered while they are gathered.
    """
    model = build("block", recipe, enable_fsdp_float8_all_gather=float8_gather)
    lone = build("block", recipe)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], OURS.plan("block", True))
    fully_shard(model, mesh=mesh["dp"])
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    assert {name: p.shape for name, p in model.state_dict().items()} == {
        name: p.shape for name, p in lone.state_dict().items()
    }
    assert all(torch.equal(p.full_tensor(), lone.state_dict()[n]) for n, p in model.state_dict().items())

    mine = mesh["dp"].get_local_rank()
    found = {}
    if once:
        model.unshard()
    for batch in range(2):
        x, dy = uneven(B, S, K, seed=batch), uneven(B, S, K, seed=10 + batch)
        want = lone(x)
        want.backward(dy)
        if batch == mine:
            with cast_weights_once(model, enabled=once):
                y = model(distribute_tensor(x, mesh["tp"], [Shard(1)]).to_local())
                y.backward(distribute_tensor(dy, mesh["tp"], [Shard(1)]).to_local())
            whole = DTensor.from_local(y.detach(), mesh["tp"], [Shard(1)], run_check=False).full_tensor()
            found["y"] = relative(whole, want.detach())
    wanted = dict(lone.named_parameters())
    return found | {n: relative(p.grad.full_tensor(), wanted[n].grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("recipe", "float8_gather", "once"),
    [
        ("tensorwise", False, False),
        ("tensorwise", True, False),
        ("tensorwise", True, True),
        ("rowwise", False, False),
        ("rowwise", False, True),
    ],
)
def test_with_fsdp(recipe: str, float8_gather: bool, once: bool) -> None:
    for found in ranks.run(4, two_dimensional, recipe, float8_gather, once):
        assert all(error < CLOSE for error in found.values()), found


# --------------------------------------------------------------------------------------------- wrong use


def message(make: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    return str(error.value)


def wrong_uses() -> dict[str, str]:
    mesh = tp_mesh()

    def apply(module: nn.Module, style: Any) -> Any:
        return lambda: parallelize_module(module, mesh, style)

    def linear(recipe: str, k: int = K, n: int = N) -> Float8Linear:
        return Float8Linear(k, n, config=recipe, emulate=True)

    def prepare(**kwargs: Any) -> PrepareFloat8ModuleInput:
        return PrepareFloat8ModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), **kwargs)

    mixed = nn.Sequential(linear("tensorwise"), linear("rowwise"))
    sharded = linear("tensorwise")
    parallelize_module(sharded, mesh, Float8ColwiseParallel())
    sharded._forward_pre_hooks.clear()
    return {
        "plain": message(apply(nn.Linear(K, N), Float8ColwiseParallel())),
        "plain_rowwise": message(apply(nn.Linear(K, N), Float8RowwiseParallel())),
        "straddle": message(apply(linear("blockwise", n=320), Float8ColwiseParallel())),
        "straddle_rowwise": message(apply(linear("mxfp8", k=96), Float8RowwiseParallel())),
        "rest": message(apply(linear("tensorwise", n=33), Float8ColwiseParallel())),
        "none": message(apply(nn.Sequential(), prepare())),
        "mixed": message(apply(mixed, prepare())),
        "dtype": message(apply(linear("tensorwise"), prepare(float8_dtype=torch.float8_e5m2))),
        "ordinary": message(lambda: sharded(torch.ones(2, 4, K))),
        "named": str(apply(mixed, prepare(fwd_config_submodule_fqn="1"))() is mixed),
    }


def test_wrong_uses_are_errors() -> None:
    messages = ranks.run(2, wrong_uses)[0]
    for name, part in {
        "plain": "Float8ColwiseParallel was applied to a Linear",
        "plain_rowwise": "Float8RowwiseParallel was applied to a Linear",
        "straddle": "blocks of 128 along out_features",
        "straddle_rowwise": "Make in_features a multiple of 64",
        "rest": "out_features=33 does not divide evenly over 2",
        "none": "without a Float8Linear",
        "mixed": "fwd_config_submodule_fqn",
        "dtype": "pass float8_dtype=torch.float8_e4m3fn",
        "ordinary": "called with an ordinary tensor",
        "named": "True",
    }.items():
        assert part in messages[name]


def test_what_was_gathered_is_for_float8_linears_only() -> None:
    x = torch.randn(6, 8)
    row = RECIPES["rowwise"].output.a
    assert row is not None
    gathered = GatheredInput(x, (quantize(x, row), None), torch.Size((2, 3, 8)))
    batch, length, features = gathered.shape
    assert (batch, length, features, gathered.dim(), gathered.size(-1)) == (2, 3, 8, 3, 8)
    assert (gathered.dtype, gathered.device) == (x.dtype, x.device)
    for use in (
        lambda: gathered.view(6, 8),
        lambda: F.linear(gathered, x),
        lambda: gathered.to(torch.bfloat16),
    ):
        assert "PrepareModuleInput" in message(use)
    assert "GatheredInput" in message(lambda: x + gathered)
