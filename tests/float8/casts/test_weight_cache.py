"""Weights are cast once per optimizer step, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from octavo.float8 import RECIPES, Float8Linear, cast_weights_once, convert_to_float8_training
from tests.float8.graphs import FLOAT8, compile_and_capture, compiles
from tests.float8.llama_block import FeedForward

MICROBATCHES = 4


class WeightCasts(TorchDispatchMode):
    """Counts conversions to float8 of tensors as large as one of `weights`, whoever makes them."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.sizes = {w.numel() for w in weights}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in FLOAT8 and isinstance(args[0], Tensor):
            from_high_precision = args[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
            self.count += from_high_precision and out.numel() in self.sizes
        return out


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def feed_forward(recipe: str, checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = FeedForward(128, 384)
    convert_to_float8_training(model, config=recipe_config(recipe))
    return Checkpointed(model) if checkpointed else model


def one_linear(recipe: str) -> nn.Module:
    """What compiles in seconds."""
    torch.manual_seed(0)
    return convert_to_float8_training(nn.Sequential(nn.Linear(128, 384)), config=recipe_config(recipe))


def recipe_config(recipe: str) -> Any:
    from dataclasses import replace

    from octavo.float8 import Float8LinearConfig

    return replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)


def train(model: nn.Module, run: Any, *, cached: bool, steps: int = 2) -> list[Tensor]:
    """Losses and final parameters of a few steps of several microbatches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    g = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        with cast_weights_once(model, enabled=cached):
            for _ in range(MICROBATCHES):
                # 256 tokens: no activation has as many elements as a weight.
                loss = run(torch.randn(256, 128, generator=g, requires_grad=True)).square().mean()
                loss.backward()
                losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_cast_an_optimizer_step(recipe: str, checkpointed: bool) -> None:
    model = feed_forward(recipe, checkpointed)
    linears = [m for m in model.modules() if isinstance(m, Float8Linear)]
    with WeightCasts([m.weight for m in linears]) as uncached:
        want = train(feed_forward(recipe, checkpointed), model, cached=False, steps=1)
    with WeightCasts([m.weight for m in linears]) as cached, cast_weights_once(model):
        for seed in range(MICROBATCHES):
            x = torch.randn(256, 128, generator=torch.Generator().manual_seed(seed), requires_grad=True)
            model(x).sum().backward()
    each = 1 if RECIPES[recipe].gatherable else 2
    assert cached.count == each * len(linears)
    # Without the scope: a forward and a backward cast a microbatch, and one more where forward runs again.
    assert uncached.count == (3 if checkpointed else 2) * MICROBATCHES * len(linears)
    assert want


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_scope_changes_no_bit(recipe: str, checkpointed: bool) -> None:
    results = []
    for cached in (False, True):
        model = feed_forward(recipe, checkpointed)
        results.append(train(model, model, cached=cached))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@compiles
@pytest.mark.parametrize("recipe", ["rowwise", pytest.param("tensorwise", marks=pytest.mark.slow)])
def test_compiled_code_takes_the_casts_as_inputs(recipe: str) -> None:
    torch._dynamo.reset()
    model = one_linear(recipe)
    got = train(model, torch.compile(model, fullgraph=True), cached=True)
    eager = one_linear(recipe)
    want = train(eager, eager, cached=False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    x = torch.randn(256, 128, requires_grad=True)

    def weight_casts() -> int:
        graphs = compile_and_capture(model, x)
        shapes = [*graphs.casts("forward"), *graphs.casts("backward")]
        return sum(torch.Size(shape).numel() == model[0].weight.numel() for shape in shapes)

    assert weight_casts() == 2
    with cast_weights_once(model):
        assert weight_casts() == 0


def test_an_optimizer_step_inside_the_scope_raises() -> None:
    model, other = feed_forward("tensorwise"), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with cast_weights_once(model):
        other_optimizer.step()
        with pytest.raises(RuntimeError, match="inside cast_weights_once"):
            optimizer.step()
    optimizer.step()


def test_scopes_do_not_nest_and_always_end() -> None:
    model = feed_forward("rowwise")
    scope = cast_weights_once(model)
    scope.__enter__()
    with pytest.raises(RuntimeError, match="already active"):
        cast_weights_once(model).__enter__()
    assert all(m.weight_cache.casts is not None for m in model.modules() if isinstance(m, Float8Linear))
    assert not scope.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert all(m.weight_cache.casts is None for m in model.modules() if isinstance(m, Float8Linear))


# ------------------------------------------------------------------ another weight inside the scope


def zeros_by_functional_call(model: nn.Module, x: Tensor) -> Tensor:
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return torch.func.functional_call(model, zeros, x)


def zeros_by_loading(model: nn.Module, x: Tensor) -> Tensor:
    model.load_state_dict({name: torch.zeros_like(p) for name, p in model.named_parameters()})
    return model(x)


def zeros_by_replacing(model: nn.Module, x: Tensor) -> Tensor:
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    return model(x)


@pytest.mark.parametrize("zeros", [zeros_by_functional_call, zeros_by_loading, zeros_by_replacing])
def test_another_weight_is_not_mistaken_for_the_one_that_was_cast(zeros: Any) -> None:
    model = nn.Sequential(Float8Linear(32, 16, bias=False, config="rowwise", emulate=True))
    x = torch.randn(4, 32)
    with cast_weights_once(model):
        assert bool(model(x).any())
        assert not bool(zeros(model, x).any())


def test_a_weight_that_is_computed_is_cast_at_each_use() -> None:
    model = Float8Linear(32, 16, bias=False, config="rowwise", emulate=True)
    nn.utils.parametrizations.weight_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.randn(4, 32)
    with cast_weights_once(model):
        before = model(x)
        before.square().sum().backward()
        optimizer.step()
        assert not torch.equal(model(x), before)
