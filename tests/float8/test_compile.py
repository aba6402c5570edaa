"""Compiled code: one graph, the same bits, and float8 saved for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from octavo.float8 import (
    RECIPES,
    Float8Linear,
    Float8LinearConfig,
    cast_weights_once,
    convert_to_float8_training,
)
from octavo.train import quantization
from tests.float8.graphs import (
    FLOAT8,
    WITHOUT_CODE,
    Graphs,
    compile_and_capture,
    compiles,
    gradients,
    saved_bytes,
)
from tests.float8.llama_block import FeedForward, LlamaBlock
from tests.float8.torchao_reference import relative

pytestmark = compiles
M, DIM, HIDDEN = 512, 256, 768
MIXED = "rowwise_with_gw_hp"
SAVING = [name for name in RECIPES if name != MIXED]
# Without a `DelayedScaling` that one's graphs are tensorwise's.
DISTINCT = [name for name in SAVING if name != "tensorwise_previous_step"]


def block(recipe: str | None, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaBlock(DIM, hidden=HIDDEN).to(dtype)
    return model if recipe is None else converted(model, recipe)


def half_a_block(recipe: str | None, dtype: torch.dtype) -> nn.Module:
    """A third of the compiling: two linears with one input, and one more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(DIM), FeedForward(DIM, HIDDEN)).to(dtype)
    return model if recipe is None else converted(model, recipe)


class Gates(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.w1(x)) * self.w3(x)


def gates(recipe: str | None, dtype: torch.dtype) -> nn.Module:
    """Less again: the two linears with one input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(DIM), Gates(DIM, HIDDEN)).to(dtype)
    del model[1].w2
    return model if recipe is None else converted(model, recipe)


Build = Callable[[str | None, torch.dtype], nn.Module]


def converted(model: nn.Module, recipe: str) -> nn.Module:
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    return convert_to_float8_training(model, config=config)


def batch(dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, M // 2, DIM, generator=g).to(dtype).requires_grad_()


# Of these no code is generated here: tensorwise is what tests/float8/test_convert.py compiles.
GRAPHS_ALONE = (MIXED, "tensorwise")


@pytest.mark.parametrize(
    ("recipe", "dtype", "backend"),
    [
        *((recipe, torch.bfloat16, "inductor") for recipe in RECIPES if recipe not in GRAPHS_ALONE),
        *((recipe, torch.bfloat16, WITHOUT_CODE) for recipe in GRAPHS_ALONE),
        ("rowwise", torch.float32, WITHOUT_CODE),
        *(
            pytest.param(recipe, torch.bfloat16, "inductor", marks=pytest.mark.slow)
            for recipe in GRAPHS_ALONE
        ),
        *(pytest.param(recipe, torch.float32, "inductor", marks=pytest.mark.slow) for recipe in RECIPES),
    ],
)
def test_a_linear_gives_the_same_bits_compiled(recipe: str, dtype: torch.dtype, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Float8Linear(128, 96, config=recipe, emulate=True, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(2, 128, 128).to(dtype)
    for got, want in zip(gradients(compiled, model, x), gradients(model, model, x), strict=True):
        assert torch.equal(got, want)
    if recipe in SAVING and dtype == torch.bfloat16:
        plain = nn.Linear(128, 96, dtype=dtype)
        x = x.requires_grad_()
        assert saved_bytes(compiled, x * 1, model) <= 0.55 * saved_bytes(plain, x * 1, plain)


@pytest.mark.parametrize(
    ("build", "dtype", "recipe"),
    [
        (gates, torch.bfloat16, "rowwise"),
        pytest.param(half_a_block, torch.bfloat16, "rowwise", marks=pytest.mark.slow),
        pytest.param(block, torch.bfloat16, "rowwise", marks=pytest.mark.slow),
        pytest.param(block, torch.bfloat16, "tensorwise", marks=pytest.mark.slow),
        pytest.param(block, torch.float32, "rowwise", marks=pytest.mark.slow),
    ],
)
def test_a_block_computes_the_same_compiled(build: Build, dtype: torch.dtype, recipe: str) -> None:
    torch._dynamo.reset()
    model, x = build(recipe, dtype), batch(dtype)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        got = gradients(torch.compile(model, fullgraph=True), model, x)
    want = gradients(model, model, x)
    if dtype == torch.bfloat16:
        assert torch.equal(got[0], want[0])
    assert relative(got[0], want[0]) < 1e-6
    # The compiler sums a norm's gradient in another order; where that moves a value across a float8 rounding
    # boundary, an element of a gradient changes by one step, which in bfloat16 is 2**-8 of it.
    limit = 2e-3 if dtype == torch.bfloat16 else 1e-4
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < limit


@cache
def captured(build: Build, recipe: str | None, dtype: torch.dtype) -> tuple[nn.Module, Graphs]:
    """A model and its graphs, weights cast in each."""
    model = build(recipe, dtype)
    return model, compile_and_capture(model, batch(dtype))


def kept(model: nn.Module, graphs: Graphs) -> tuple[int, Counter[int]]:
    """Bytes that a compiled graph keeps besides parameters, and the sizes of what it keeps in float8."""
    parameters = {tuple(p.shape) for p in model.parameters()}
    tensors = [t for t in graphs.saved() if tuple(t.shape) not in parameters and t.data_ptr is not None]
    total = sum(t.numel() * t.element_size() for t in tensors)
    return total, Counter(t.numel() for t in tensors if t.dtype in FLOAT8)


@pytest.mark.parametrize(
    ("build", "narrow", "recipe", "dtype"),
    [
        # What w1 and w3 take; in the whole block also what wo takes, and what wq, wk and wv take.
        *((half_a_block, 1, recipe, torch.float32) for recipe in DISTINCT),
        (half_a_block, 1, "rowwise", torch.bfloat16),
        *(
            pytest.param(half_a_block, 1, recipe, torch.bfloat16, marks=pytest.mark.slow)
            for recipe in SAVING
            if recipe != "rowwise"
        ),
        *(
            pytest.param(block, 3, recipe, dtype, marks=pytest.mark.slow)
            for recipe in SAVING
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_a_block_keeps_its_inputs_in_float8(
    build: Build, narrow: int, recipe: str, dtype: torch.dtype
) -> None:
    total, float8 = kept(*captured(build, recipe, dtype))
    assert total <= 0.75 * kept(*captured(build, None, dtype))[0]
    assert float8 == {M * DIM: narrow} | ({M * HIDDEN: 1} if dtype == torch.float32 else {})


@pytest.mark.parametrize(
    ("build", "inputs", "linears", "recipe"),
    [
        *((half_a_block, 2, 3, recipe) for recipe in DISTINCT),
        *(pytest.param(block, 4, 7, recipe, marks=pytest.mark.slow) for recipe in SAVING),
    ],
)
def test_backward_casts_only_its_gradients(build: Build, inputs: int, linears: int, recipe: str) -> None:
    model, uncached = captured(build, recipe, torch.float32)
    with cast_weights_once(model):
        cached = compile_and_capture(model, batch(torch.float32))
    square = recipe in ("tensorwise", "tensorwise_previous_step")
    gradients_cast = 1 if square else 2
    assert len(cached.casts("backward")) == gradients_cast * linears
    assert len(uncached.casts("backward")) == (gradients_cast + 1) * linears
    # Forward: the distinct inputs, for both products, and each weight where it is not cached.
    assert len(cached.casts("forward")) == (1 if square else 2) * inputs
    assert len(uncached.casts("forward")) == (1 if square else 2) * inputs + linears


def test_without_the_guard_the_compiler_keeps_no_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pin_saved` is for: should the compiler do it by itself one day, `pin_saved` can go."""
    monkeypatch.setattr("octavo.float8.casts.operands.pin_saved", lambda casts, one_cast: casts)
    model = gates("rowwise", torch.bfloat16)
    _, float8 = kept(model, compile_and_capture(model, batch(torch.bfloat16)))
    assert not float8


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_checkpointing_recasts_activations_and_no_weight() -> None:
    model, x = Checkpointed(half_a_block("rowwise", torch.bfloat16)), batch(torch.bfloat16)
    with cast_weights_once(model):
        graphs = compile_and_capture(model, x)
    assert not any(t.dtype in FLOAT8 and t.numel() == M * DIM for t in graphs.saved())
    weights = {(HIDDEN, DIM), (DIM, HIDDEN)}
    shapes = [tuple(n for n in s if n > 1) for s in (*graphs.casts("forward"), *graphs.casts("backward"))]
    assert not weights & set(shapes)
    assert len(graphs.casts("backward")) > 2 * 3  # activations again


@pytest.mark.parametrize("backend", [WITHOUT_CODE, pytest.param("inductor", marks=pytest.mark.slow)])
def test_shapes_may_change(backend: str) -> None:
    torch._dynamo.reset()
    model = Float8Linear(64, 48, config="rowwise", emulate=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 16, 33):
        x = torch.randn(tokens, 64)
        got, want = gradients(compiled, model, x), gradients(model, model, x)
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_traced_of_a_layer_may_be_kept_for_the_next_process(recipe: str) -> None:
    """By torch's own judgement of the graph, once the trainer has said that our autograd functions may."""
    import torch._functorch.config as functorch
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = converted(nn.Sequential(nn.Linear(32, 16)), recipe)
    torch.compile(model, backend=keep, fullgraph=True)(torch.randn(16, 32, requires_grad=True))
    with functorch.patch(autograd_cache_allow_custom_autograd_functions=False):
        with pytest.raises(BypassAOTAutogradCache):
            check_cacheable(graphs[0])
        quantization.keep_traces_of_compiled_layers()
        check_cacheable(graphs[0])
