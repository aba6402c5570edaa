"""Health: every number equals its definition in float64, audits leave the model unchanged, and monitors
measure the same numbers in compiled and in eager code.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from octavo.float8 import FULL, RECIPES, Cast, Float8LinearConfig, Gemm, Recipe, convert_to_float8_training
from octavo.float8.health import Measurement, Monitor, Table, audit, watch
from octavo.float8.quantize import dequantize, quantize, scales_from_amax
from octavo.float8.recipe import ScaleFormat
from tests.float8.graphs import WITHOUT_CODE, compiles
from tests.helpers import ranks

TOKENS, K, N = 150, 160, 144


def converted(model: nn.Module, recipe: str = "rowwise") -> nn.Module:
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    return convert_to_float8_training(model, config=config)


class Mlp(nn.Module):
    def __init__(self, dim: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """`[..., 64] -> [..., 64]`, with residuals."""

    def __init__(self, layers: int = 2, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def stack(recipe: str = "rowwise", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return converted(Stack(**kwargs), recipe)


def tokens(count: int = 40) -> Tensor:
    return torch.randn(2, count, 64, generator=torch.Generator().manual_seed(1))


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def find(table: Table, layer: str, operand: str, gemm: str, recipe: str | None = None) -> Measurement:
    (row,) = (
        r
        for r in table.rows
        if (r.layer, r.operand) == (layer, operand) and gemm in r.gemms and recipe in (None, r.recipe)
    )
    return row


def by_hand(operand: Tensor, cast: Cast) -> dict[str, float]:
    """A `Measurement`'s numbers by definition, in float64. The operand is `[rows, contraction]`."""
    back = dequantize(quantize(operand, cast), cast.block).double()
    exact = operand.double()
    rows, cols = (n if b == FULL else b for b, n in zip(cast.block, operand.shape, strict=True))
    scaled = torch.empty_like(exact)
    for i in range(0, exact.shape[0], rows):
        for j in range(0, exact.shape[1], cols):
            block = operand[i : i + rows, j : j + cols]
            s, _ = scales_from_amax(block.abs().max(), cast)
            scaled[i : i + rows, j : j + cols] = (block.float() * s).double()
    limit = torch.finfo(cast.dtype).max
    noise = (back - exact).square().sum()
    return {
        "values": exact.numel(),
        "amax": exact.abs().max().item(),
        "flushed": ((exact != 0) & (back == 0)).double().mean().item(),
        "saturated": (scaled.abs() > limit).double().mean().item(),
        "nonfinite": 0.0,
        "sqnr": (10 * torch.log10(exact.square().sum() / noise)).item(),
    }


def assert_row(row: Measurement, operand: Tensor, cast: Cast) -> None:
    for name, want in by_hand(operand, cast).items():
        assert getattr(row, name) == pytest.approx(want, rel=1e-9, abs=1e-12), (name, row)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIXED = Recipe(  # both dtypes, every kind of scale, blocks that are neither whole nor square
    "mixed",
    Gemm(Cast(E4M3, (FULL, 8), ScaleFormat.POW2), Cast(E5M2, (3, 40))),
    Gemm(Cast(E5M2, (1, 16), ScaleFormat.E8M0), Cast(E4M3, (FULL, FULL))),
    Gemm(Cast(E5M2, (7, FULL)), Cast(E4M3, (1, 32), ScaleFormat.E8M0_FLOOR)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [*RECIPES.values(), MIXED], ids=lambda r: r.name)
def test_every_number_is_that_of_its_definition(recipe: Recipe, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(K, N, dtype=dtype)
    # Magnitudes over 14 decades, so that values are flushed in every format.
    x = (torch.randn(TOKENS, K) * 10.0 ** torch.randint(-12, 3, (TOKENS, K))).to(dtype)
    dy = (torch.randn(TOKENS, N) * 10.0 ** torch.randint(-12, 3, (TOKENS, N))).to(dtype)
    table = audit(plain, x, loss=lambda y: (y.float() * dy.float()).sum(), recipes=[recipe])
    w = plain.weight.detach()
    o, gi, gw = recipe.output, recipe.grad_input, recipe.grad_weight
    checked = 0
    for gemm, operand, tensor, cast in (
        ("output", "input", x, o.a),
        ("grad_weight", "input", x.t(), gw.b),
        ("output", "weight", w, o.b),
        ("grad_input", "weight", w.t(), gi.b),
        ("grad_input", "grad_output", dy, gi.a),
        ("grad_weight", "grad_output", dy.t(), gw.a),
    ):
        if cast is not None:
            assert_row(find(table, "", operand, gemm), tensor, cast)
            checked += 1
    assert sum(len(row.gemms) for row in table.rows) == checked
    assert any(row.flushed > 0 for row in table.rows)
    if recipe is MIXED:
        assert any(row.saturated > 0 for row in table.rows)


def test_one_row_where_one_cast_serves_both_products() -> None:
    tensorwise = audit(stack("tensorwise"), tokens())
    assert len(tensorwise.rows) == 4 * 3
    assert find(tensorwise, "layers.0.up", "input", "output").gemms == ("output", "grad_weight")
    assert len(audit(stack("rowwise"), tokens()).rows) == 4 * 6
    assert len(audit(stack("rowwise_with_gw_hp"), tokens()).rows) == 4 * 4


def test_nan_and_inf_are_counted_apart() -> None:
    plain = nn.Linear(64, 64)
    x = torch.randn(40, 64)
    plain.weight.data[0, 0] = 1e-9
    x[3, 5], x[7, 1], x[7, 2] = math.inf, math.nan, -math.inf
    table = audit(plain, x, loss=lambda y: y[0].sum(), recipes=["rowwise", "tensorwise"])
    row = find(table, "", "input", "output", "rowwise")
    assert row.nonfinite == pytest.approx(3 / x.numel())
    assert math.isnan(row.amax)
    assert row.saturated == 0
    assert math.isnan(row.sqnr)  # the neighbours of an infinity become NaN
    assert find(table, "", "weight", "output", "tensorwise").flushed > 0
    for by in ("flushed", "saturated", "nonfinite", "sqnr"):
        assert {row.operand for row in table.worst(3, by=by).rows} == {"input"}


def test_tensors_without_loss_and_without_values() -> None:
    plain = nn.Linear(64, 64)
    zeros = find(audit(plain, torch.zeros(40, 64), recipes=["blockwise"]), "", "input", "output")
    assert (zeros.amax, zeros.flushed, zeros.sqnr) == (0, 0, math.inf)
    for recipe in RECIPES:
        empty = find(
            audit(plain, torch.zeros(0, 64), loss=torch.sum, recipes=[recipe]), "", "input", "output"
        )
        assert (empty.values, empty.amax, empty.flushed) == (0, 0, 0)


def test_the_layer_with_an_outlier_is_named() -> None:
    model = stack("tensorwise", layers=3)
    with torch.no_grad():
        model.layers[1].down.weight[3, 5] = 1e6
    table = audit(model, tokens(), recipes=["rowwise"])
    worst = table.worst(1).rows[0]
    assert (worst.layer, worst.operand, worst.recipe) == ("layers.1.down", "weight", "tensorwise")
    assert worst.flushed > 0.9
    # ... and another recipe that confines it is seen to.
    fine = find(table, "layers.1.down", "weight", "output", "rowwise")
    assert fine.flushed < 0.05
    by_sqnr = [row.sqnr for row in table.worst(10, by="sqnr").rows]
    assert by_sqnr == sorted(row.sqnr for row in table.rows)[:10]
    with pytest.raises(ValueError, match="by='loss'"):
        table.worst(by="loss")
    printed = str(table)
    assert len({len(line.rstrip()) for line in printed.splitlines()}) == 1
    assert "layers.1.down" in printed


def test_an_audit_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = converted(
        nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 64))
    )
    model[3].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(64, 64)
    hooked: list[Any] = []
    model[3].weight.register_post_accumulate_grad_hook(hooked.append)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    table = audit(model, tokens().flatten(0, 1))
    assert len(table.rows) == 12
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(64, 64))
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True, True, True]
    assert not model[0].bias.requires_grad
    assert not hooked
    assert [m.training for m in model] == [True, True, True, False]
    assert all(not m._forward_hooks for m in model.modules())
    assert str(audit(model, tokens().flatten(0, 1))) != ""
    # Frozen layers are measured as others are.
    model.requires_grad_(False)
    with torch.no_grad():
        assert len(audit(model, tokens().flatten(0, 1)).rows) == 12


def test_batches_and_losses_of_several_kinds() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.unused = nn.Linear(64, 64)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return (self.linear(x) * scale).square().mean()

    torch.manual_seed(0)
    model, x = Model(), tokens()
    tables = [
        audit(model, batch, recipes=["rowwise"]) for batch in (x, (x,), [x, 1.0], {"x": x, "scale": 1.0})
    ]
    assert all(table == tables[0] for table in tables)
    assert {row.layer for row in tables[0].rows} == {"linear"}
    assert audit(model, (x, 2.0), recipes=["rowwise"]) != tables[0]
    with pytest.raises(ValueError, match="one number"):
        audit(model.linear, x, loss=lambda y: y, recipes=["rowwise"])
    with pytest.raises(ValueError, match="name recipes"):
        audit(model, x)
    with pytest.raises(ValueError, match="no linear layers"):
        audit(nn.ReLU(), x, recipes=["rowwise"])
    with pytest.raises(ValueError, match="nosuch"):
        audit(model, x, recipes=["nosuch"])


def test_recipes_to_compare_come_beside_a_layers_own() -> None:
    model = nn.Sequential(converted(nn.Linear(64, 64), "tensorwise"), nn.Linear(64, 64))
    table = audit(model, tokens(), recipes=["tensorwise", "mxfp8"])
    recipes = {layer: [row.recipe for row in table.rows if row.layer == layer] for layer in "01"}
    assert recipes["0"] == recipes["1"]
    assert set(recipes["0"]) == {"tensorwise", "mxfp8"}
    assert {row.layer for row in audit(model, tokens()).rows} == {"0"}


# ------------------------------------------------------------------------------------------------- monitoring


def run(model: nn.Module, monitor: Monitor, *microbatches: Tensor) -> bool:
    with monitor.step() as measuring:
        for x in microbatches:
            mean_square(model(x)).backward()
    return measuring


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_monitor_sees_what_an_audit_sees(checkpointed: bool) -> None:
    model = stack(checkpointed=checkpointed)
    monitor = Monitor(model, every=3, sample=None)
    assert [run(model, monitor, tokens()) for _ in range(4)] == [True, False, False, True]
    assert monitor.table == audit(model, tokens(), loss=mean_square)


def test_a_monitor_changes_no_gradient_and_leaves_nothing() -> None:
    model = stack()
    mean_square(model(tokens())).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monitor = Monitor(model, filter_fn=lambda module, fqn: fqn.endswith("up"))
    run(model, monitor, tokens())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))
    assert {row.layer for row in monitor.table.rows} == {"layers.0.up", "layers.1.up"}
    assert all(getattr(m, "watch", None) is None for m in model.modules())
    copy.deepcopy(model)


def test_a_watched_layers_output_may_be_changed_in_place() -> None:
    model = converted(nn.Linear(64, 64))
    with Monitor(model).step():
        y = model(tokens())
        y += 1
        mean_square(y).backward()


def test_microbatches_and_repeated_calls_are_put_together() -> None:
    torch.manual_seed(0)
    model = converted(nn.Linear(64, 48))
    a, b = torch.randn(10, 64), 5 * torch.randn(30, 64)
    monitor = Monitor(model, sample=None)
    run(model, monitor, a, b)
    row = find(monitor.table, "", "input", "output")
    assert_row(row, torch.cat([a, b]), model.recipe.output.a)  # row scales know no batch
    with monitor.step():
        pass
    monitor.steps = 0
    with monitor.step():
        mean_square(torch.cat([model(a), model(b)])).backward()
    assert find(monitor.table, "", "input", "output") == row


def test_an_input_that_layers_share_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 48)]))
    measure, measured = watch.measure, []

    def counting(x: Tensor, *args: Any) -> Tensor:
        measured.append(tuple(x.shape))
        return measure(x, *args)

    monkeypatch.setattr(watch, "measure", counting)
    monitor = Monitor(model)
    first, second = model.children()
    with monitor.step():
        x = torch.randn(64, 32, requires_grad=True) * 2.0
        (first(x).sum() + second(x).sum() + first(x * 3.0).sum()).backward()
    assert measured.count((64, 32)) == 2
    amax = {row.layer: row.amax for row in monitor.table.rows if row.operand == "input"}
    assert amax["0"] == pytest.approx(3 * amax["1"])


def test_selective_checkpointing_does_not_look_at_what_is_measured() -> None:
    linear, seen = converted(nn.Linear(64, 64)), list[Any]()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(op)
        return CheckpointPolicy.PREFER_RECOMPUTE

    def selective() -> Any:
        return create_selective_checkpoint_contexts(policy)

    monitor = Monitor(linear, every=2)
    for _ in range(2):  # the first step is measured, the second is not
        with monitor.step():
            checkpoint(linear, tokens(), use_reentrant=False, context_fn=selective).sum().backward()
        seen.append(None)
    measured = seen.index(None)
    plain = len(seen) - measured - 2
    assert plain > 50
    assert measured - plain < 10  # the tap and its probe, forward and again


def test_a_sample_has_the_whole_tensors_scales() -> None:
    torch.manual_seed(0)
    model = converted(nn.Linear(64, 48), "tensorwise")
    x = torch.randn(1000, 64)
    x[500, 3] = 1e6  # not in the sample
    monitor = Monitor(model, sample=10)
    run(model, monitor, x)
    row = find(monitor.table, "", "input", "output")
    assert row.amax == x.abs().max().item()
    assert 0 < row.values <= 10 * 64
    assert row.flushed > 0.95


def test_what_a_monitor_refuses() -> None:
    model = stack()
    with pytest.raises(ValueError, match="no Float8Linear"):
        Monitor(Stack())
    with pytest.raises(ValueError, match="none of the 4 Float8Linears"):
        Monitor(model, filter_fn=lambda module, fqn: False)
    with pytest.raises(ValueError, match="every=0"):
        Monitor(model, every=0)
    with pytest.raises(ValueError, match="sample=0"):
        Monitor(model, sample=0)
    with pytest.raises(RuntimeError, match="inside Monitor.step"), Monitor(model).step():
        model(tokens())
    model.layers[0].up.tensor_parallel = True
    with pytest.raises(ValueError, match="layers.0.up is sharded"):
        Monitor(model)


@compiles
@pytest.mark.parametrize(
    ("backend", "checkpointed"),
    [
        pytest.param(WITHOUT_CODE, False, marks=pytest.mark.slow),
        (WITHOUT_CODE, True),
        pytest.param("inductor", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_are_measured_without_a_break(backend: str, checkpointed: bool) -> None:
    """The numbers of eager code; and a graph of its own for measured steps only."""
    model = stack(checkpointed=checkpointed)
    xs = tokens(), 3 * tokens()
    want = Monitor(model, sample=16)
    run(model, want, *xs)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    monitor = Monitor(model, every=2, sample=16, filter_fn=lambda module, fqn: "1" in fqn)
    ran = []
    for _ in range(4):
        ran.append(run(model, monitor, *(x.clone().requires_grad_() for x in xs)))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert ran == [True, False, True, False]
    assert graphs == 2  # layer 0 and, unmeasured, layer 1; layer 1 measured
    expected = [row for row in want.table.rows if "layers.1" in row.layer]
    assert len(expected) == len(monitor.table.rows) == 12
    for got, row in zip(monitor.table.rows, expected, strict=True):
        assert (got.layer, got.operand, got.gemms, got.values) == (
            row.layer,
            row.operand,
            row.gemms,
            row.values,
        )
        assert got.amax == pytest.approx(row.amax, rel=1e-5)
        assert got.flushed == pytest.approx(row.flushed, abs=1e-3)
        assert got.sqnr == pytest.approx(row.sqnr, abs=0.05)
    assert audit(model, xs[0]).rows[0].layer == "layers.0.up"  # a compiled model is audited as well


def _sharded() -> list[bool]:
    """Whether FSDP2's ranks measure what one process does: here every rank has the same tokens."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    verdicts = []
    for gather in (False, True):
        config = replace(
            Float8LinearConfig.from_recipe_name("tensorwise"),
            emulate=True,
            enable_fsdp_float8_all_gather=gather,
        )
        torch.manual_seed(0)
        whole = convert_to_float8_training(Stack(), config=config)
        model = copy.deepcopy(whole)
        for module in (*model.layers, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
            module.set_gradient_divide_factor(1.0)  # gloo has no average
            module.set_force_sum_reduction_for_comms(True)
        want, got = Monitor(whole, sample=None), Monitor(model, sample=None)
        run(whole, want, tokens())
        run(model, got, tokens())
        verdicts += [got.table == want.table, len(got.table.rows) == 12]
        verdicts.append(audit(model, tokens(), loss=mean_square) == want.table)
    return verdicts


def test_sharded_models_are_measured() -> None:
    assert ranks.run(2, _sharded) == [[True] * 6] * 2


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers() -> None:
    model = stack("tensorwise")
    want = audit(model, tokens(), loss=mean_square)
    got = audit(model.cuda(), tokens().cuda(), loss=mean_square)
    for a, b in zip(got.rows, want.rows, strict=True):
        assert (a.layer, a.operand, a.values) == (b.layer, b.operand, b.values)
        assert a.amax == pytest.approx(b.amax, rel=1e-4)
        assert a.sqnr == pytest.approx(b.sqnr, abs=0.1)
    monitor = Monitor(model, sample=None)
    run(model, monitor, tokens().cuda())
    assert monitor.table == audit(model, tokens().cuda(), loss=mean_square)


def test_a_layer_is_measured_by_one_monitor_at_a_time() -> None:
    model = convert_to_float8_training(nn.Sequential(nn.Linear(32, 16)), config="rowwise")
    first, second = Monitor(model, every=1), Monitor(model, every=1)
    with first.step():
        with pytest.raises(RuntimeError, match="0 is already being measured"), second.step():
            pass
        model(torch.randn(4, 32)).sum().backward()
    assert first.table.rows


def test_an_audit_that_measures_nothing_is_an_error() -> None:
    model = convert_to_float8_training(nn.Sequential(nn.Linear(32, 16)), config="rowwise")
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="the loss depends on no linear layer"):
        audit(model, x, loss=lambda y: y.detach().sum().requires_grad_())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside torch.inference_mode"):
        audit(model, x)
    with pytest.raises(ValueError, match=r"give a list, \['rowwise'\]"):
        audit(model, x, recipes="rowwise")
