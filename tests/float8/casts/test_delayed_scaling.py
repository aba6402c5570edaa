"""Delayed scaling: which maximum it casts with, what it records, and when it falls back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from octavo.float8 import (
    FULL,
    RECIPES,
    Cast,
    DelayedScaling,
    Float8Linear,
    ScaleFormat,
    When,
    cast_weights_once,
    convert_to_float8_training,
)
from octavo.float8.casts.delayed_statistics import OperandStatistics, quantize_operand
from octavo.float8.casts.operands import cast_weight
from octavo.float8.product import Float8Matmul, ProductSpec
from octavo.float8.quantize import dequantize, quantize_with_amax, transposed
from tests.float8.graphs import compiles

RECIPE = RECIPES["tensorwise_previous_step"]
CAST = Cast(torch.float8_e4m3fn, (FULL, FULL), when=When.PREVIOUS_STEP)


class Two(nn.Module):
    """Two layers that read one tensor, and one that reads theirs."""

    same_input = (("a", "b"),)

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.checkpointed = checkpointed

    def run(self, x: Tensor) -> Tensor:
        x = x * 1.0  # the result of an operation, which eager code shares the casts of
        return self.c(self.a(x).sigmoid() * self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)


def build(recipe: str = "tensorwise_previous_step", *, checkpointed: bool = False) -> Two:
    model = Two(checkpointed=checkpointed)
    convert_to_float8_training(model, config=recipe)
    return model


def batch(seed: int, size: float = 1.0, rows: int = 24) -> Tensor:
    return size * torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, *xs: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients of a step over the microbatches xs."""
    model.zero_grad()
    outputs = []
    for x in xs:
        x = x.clone().requires_grad_()
        y = (model if run is None else run)(x)
        y.square().sum().backward()
        assert x.grad is not None
        outputs += [y.detach(), x.grad]
    return [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_only_one_float32_scale_a_tensor_can_be_the_previous_steps() -> None:
    with pytest.raises(ValueError, match=r"blocks of 1 x FULL .* use When.JUST_IN_TIME"):
        Cast(torch.float8_e4m3fn, (1, FULL), when=When.PREVIOUS_STEP)
    with pytest.raises(ValueError, match="one float32 scale per tensor only"):
        Cast(torch.float8_e4m3fn, (FULL, FULL), ScaleFormat.E8M0, when=When.PREVIOUS_STEP)
    with pytest.raises(ValueError, match="bound = 2 must be a share"):
        DelayedScaling(build(), bound=2)


def test_the_first_step_is_tensorwise_and_so_is_all_without_a_keeper() -> None:
    want = gradients(build("tensorwise"), batch(0), batch(1))
    model = build()
    assert same(gradients(model, batch(0), batch(1)), want)
    scales = DelayedScaling(model)
    assert same(gradients(model, batch(0), batch(1)), want)
    report = scales.end_step()
    assert (report.just_in_time, report.falls_back, report.saturated) == (True, False, 0.0)


def test_the_next_step_casts_with_the_maxima_of_the_last() -> None:
    model = build()
    scales = DelayedScaling(model)
    first = [batch(0), batch(1, 1.5)]
    gradients(model, *first)
    scales.end_step()
    x = batch(2)
    amax = torch.stack(first).abs().max()
    assert scales.statistics["a.input"].previous_amax.item() == amax
    q = quantize_with_amax(x, amax.view(1, 1), CAST)
    w, _ = cast_weight(model.a.weight, model.a.recipe, for_grad_input=False)
    assert w is not None
    want = dequantize(q, CAST.block) @ dequantize(w, CAST.block).t() + model.a.bias
    torch.testing.assert_close(model.a(x), want)
    # Not its own maximum: the codes differ from those just in time.
    assert not torch.equal(model.a(x), build("tensorwise").a(x))


def test_gradients_are_cast_with_theirs() -> None:
    model = build()
    scales = DelayedScaling(model)
    gradients(model, batch(0))
    scales.end_step()
    amax = scales.statistics["c.grad_output"].previous_amax
    x, dy = torch.randn(8, 32, requires_grad=True), torch.randn(8, 16)
    model.c(x).backward(dy)
    w = cast_weight(model.c.weight, model.c.recipe, for_grad_input=True)[1]
    q = quantize_with_amax(dy, amax, Cast(torch.float8_e5m2, (FULL, FULL)))
    assert w is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dequantize(q, (FULL, FULL)) @ dequantize(w, (FULL, FULL)).t())
    seen = scales.statistics["c.grad_output"].current_amax.item()
    assert seen == dy.abs().max()


def test_layers_with_one_input_share_its_cast() -> None:
    model = build()
    scales = DelayedScaling(model)
    assert model.a.statistics is not None
    assert model.b.statistics is not None
    assert model.a.statistics.input is model.b.statistics.input
    assert model.a.statistics.grad_output is not model.b.statistics.grad_output
    assert sorted(scales.statistics) == [
        *("a.grad_output", "a.input", "b.grad_output"),
        *("c.grad_output", "c.input"),
    ]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_saturation_is_counted_once_and_leads_to_a_step_just_in_time(checkpointed: bool) -> None:
    model = build(checkpointed=checkpointed)
    scales = DelayedScaling(model, bound=0.05)
    gradients(model, batch(0))
    scales.end_step()
    gradients(model, batch(1, 8.0), batch(2, 8.0))
    amax = batch(0).abs().max()
    beyond = sum(int((batch(seed, 8.0).abs() > amax).sum()) for seed in (1, 2))
    # Read by two layers: eager code casts it once, and counts it once, for both.
    assert scales.statistics["a.input"].counts.tolist() == [beyond, 2 * 24 * 16]
    report = scales.end_step()
    assert report.falls_back
    assert report.saturated > 0.05
    assert report.operand in scales.statistics
    # Just in time: as if there were no scales.
    x = batch(3, 8.0)
    with torch.no_grad():
        assert torch.equal(model(x), build("tensorwise")(x))
    gradients(model, batch(3, 8.0))
    report = scales.end_step()
    assert report.just_in_time
    assert not report.falls_back
    gradients(model, batch(3, 8.0))
    report = scales.end_step()
    assert not report.just_in_time
    assert report.saturated == 0.0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_and_is_no_maximum(value: float) -> None:
    model = build()
    scales = DelayedScaling(model)
    gradients(model, batch(0))
    scales.end_step()
    x = batch(1)
    x[3, 5] = value
    y = gradients(model, x)[0]
    assert y[3].isnan().all()
    assert y[4].isfinite().all()
    before = scales.statistics["a.input"].previous_amax.item()
    scales.end_step()
    assert scales.statistics["a.input"].previous_amax.item() == before


def test_a_cast_saturates_at_the_maximum() -> None:
    operand = OperandStatistics(
        torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(2, dtype=torch.int64), valid=True
    )
    x = torch.tensor([[0.5, 1.0, 3e38, -7.0], [torch.nan, torch.inf, -torch.inf, 0.0]])
    first, second = quantize_operand(x, CAST, CAST, statistics=operand)
    values = dequantize(first, CAST.block)
    torch.testing.assert_close(values[0], torch.tensor([0.5, 1.0, 1.0, -1.0]))
    assert values[1, :3].isnan().all()
    assert values[1, 3] == 0
    assert torch.equal(second.data.view(torch.uint8), transposed(first).data.view(torch.uint8))
    assert operand.counts.tolist() == [2, 8]


class _Counted(TorchDispatchMode):
    """Counts operations."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_end_of_a_step_takes_as_many_operations_for_many_layers_as_for_few() -> None:
    calls = []
    for layers in (1, 9):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        scales = DelayedScaling(convert_to_float8_training(model, config="tensorwise_previous_step"))
        gradients(model, batch(0))
        with _Counted() as counted:
            scales.end_step()
        calls.append(counted.calls)

    assert calls[0] == calls[1]


def test_inference_notes_nothing() -> None:
    model = build()
    scales = DelayedScaling(model)
    gradients(model, batch(0))
    scales.end_step()
    with torch.no_grad():
        model(batch(1, 100.0))
    assert all(o.current_amax.item() == 0 and o.counts.tolist() == [0, 0] for o in scales.statistics.values())


def test_two_passes_over_one_graph_count_once() -> None:
    """As zero-bubble schedules run backward."""
    model = build()
    scales = DelayedScaling(model)
    gradients(model, batch(0))
    scales.end_step()
    x = torch.randn(24, 32, requires_grad=True)
    loss = model.c(x).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(loss, model.c.weight)
    assert scales.statistics["c.grad_output"].counts.tolist()[1] == 24 * 16


def test_an_operand_that_is_always_zero_stays_just_in_time() -> None:
    model = build()
    scales = DelayedScaling(model)
    for _ in range(2):
        gradients(model, 0 * batch(0))
        scales.end_step()
    assert not scales.statistics["a.input"].valid
    assert scales.statistics["c.input"].valid
    want = gradients(build("tensorwise"), batch(0))[0]
    assert torch.equal(model.a(batch(0)), build("tensorwise").a(batch(0)))
    assert want.isfinite().all()


def test_state_goes_through_json_and_the_models_stays_plain() -> None:
    model = build()
    scales = DelayedScaling(model)
    for seed in range(2):
        gradients(model, batch(seed))
        scales.end_step()
    state = json.loads(json.dumps(scales.state_dict()))
    want = [gradients(model, batch(5)), (scales.end_step(), gradients(model, batch(6)))[1]]

    other = build()
    assert list(model.state_dict()) == list(Two().state_dict())
    other.load_state_dict(model.state_dict())
    again = DelayedScaling(other)
    again.load_state_dict(state)
    got = [gradients(other, batch(5)), (again.end_step(), gradients(other, batch(6)))[1]]
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert again.state_dict() == scales.state_dict()
    copied = copy.deepcopy(model)
    assert isinstance(copied.a, Float8Linear)
    assert copied.a.statistics is None


def test_weights_cast_once_change_no_bit() -> None:
    runs = []
    for once in (False, True):
        model = build()
        scales = DelayedScaling(model)
        for seed in range(3):
            with cast_weights_once(model, enabled=once):
                got = gradients(model, batch(seed), batch(seed + 10))
            scales.end_step()
        runs.append(got)
    assert same(*runs)


@compiles
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_code_equals_eager_in_two_graphs(checkpointed: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, model = build(checkpointed=checkpointed), build(checkpointed=checkpointed)
    run = torch.compile(model, fullgraph=True, backend=counter)
    one, other = DelayedScaling(eager, bound=0.5), DelayedScaling(model, bound=0.5)
    for seed in range(4):
        xs = batch(seed), batch(seed + 10, 1.3)
        assert same(gradients(eager, *xs), gradients(model, *xs, run=run))
        for name, operand in one.statistics.items():
            assert torch.equal(operand.current_amax, other.statistics[name].current_amax), name
            saturated, elements = operand.counts.tolist()
            mine, all_of_mine = other.statistics[name].counts.tolist()
            # Compiled code counts a shared input for each layer that reads it; the share is the same.
            assert saturated * all_of_mine == mine * elements, name
        assert one.end_step() == other.end_step()
    assert counter.frame_count == 2


def test_the_function_takes_calls_without_operands() -> None:
    x, w = torch.randn(4, 16), torch.randn(8, 16)
    q = [None] * 8
    hp = RECIPES["rowwise_with_gw_hp"]
    hp = type(hp)("high precision", hp.grad_weight, hp.grad_weight, hp.grad_weight)
    (y,) = Float8Matmul.apply(ProductSpec(hp), None, x, w, *q)
    assert torch.equal(y, x @ w.t())
    assert RECIPE.gatherable
