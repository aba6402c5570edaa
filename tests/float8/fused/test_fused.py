"""Fused modules compute what their modules do, save no more for backward, and keep parameters unchanged."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from octavo.float8 import DelayedScaling, Float8LinearConfig, cast_weights_once, convert_to_float8_training
from octavo.float8.fused import GatedLinear, NormedInput, SharedInput
from octavo.float8.fused.shared_input import why_not_joined
from octavo.float8.health import Monitor
from octavo.float8.recipe import RECIPES
from tests.float8.graphs import compile_and_capture, compiles, gradients, saved_bytes
from tests.float8.llama_block import LlamaBlock

pytestmark = pytest.mark.usefixtures("products_in_float32")

DIM, HIDDEN = 256, 384  # q is 256 rows and k 128: blocks of 128 do not straddle them


class Fused(LlamaBlock):
    """`LlamaBlock`, fused; `fuse` sets what it computes with."""

    def forward(self, x: Tensor) -> Tensor:
        h, qkv = self.enter(x)
        q, k, v = (part.value for part in qkv)
        (out,) = self.leave(self.attention.attend(q, k, v.contiguous()), note_maxima=True)
        h, (gate, up) = self.gates(out, h, note_maxima=True)
        return h + self.down(gate, up).value


def fuse(block: LlamaBlock, *, shared_scales: bool = False) -> Fused:
    block.__class__ = Fused
    a, f = block.attention, block.feed_forward
    block.enter = NormedInput(block.attention_norm, (a.wq, a.wk, a.wv), shared_scales=shared_scales)
    block.leave = SharedInput([a.wo])
    block.gates = NormedInput(block.ffn_norm, (f.w1, f.w3), shared_scales=shared_scales)
    block.down = GatedLinear(f.w2)
    return block


class Half(nn.Module):
    """The second half of a block, fused: a third of the compiling."""

    def __init__(self, block: LlamaBlock) -> None:
        super().__init__()
        self.norm, f = block.ffn_norm, block.feed_forward
        self.w1, self.w2, self.w3 = f.w1, f.w2, f.w3
        self.gates, self.down = NormedInput(self.norm, (f.w1, f.w3)), GatedLinear(f.w2)

    def forward(self, x: Tensor) -> Tensor:
        h, (gate, up) = self.gates(x)
        return h + self.down(gate, up).value


def make(recipe: str | None, dtype: torch.dtype = torch.float32) -> LlamaBlock:
    torch.manual_seed(0)
    block = LlamaBlock(DIM, heads=8, kv_heads=4, hidden=HIDDEN)
    with torch.no_grad():  # outliers, so that a scale shared by too many would show
        for p in block.parameters():
            p.mul_(torch.exp2(torch.randint(-3, 4, p.shape[:1]).float()).view(-1, *[1] * (p.dim() - 1)))
    if recipe is not None:
        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
        convert_to_float8_training(block, config=config)
    return block.to(dtype)


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor], limit: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert float((one.double() - other.double()).norm() / other.double().norm()) <= limit


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_block_computes_the_same(recipe: str | None) -> None:
    plain = make(recipe)
    fused = fuse(copy.deepcopy(plain))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    want = gradients(plain, plain, data())
    assert_near(gradients(fused, fused, data()), want, 1e-6)
    with cast_weights_once(fused):
        assert (fused.enter.shared.joined_casts is not None) == (
            recipe not in (None, "tensorwise", "tensorwise_previous_step")
        )
        assert_near(gradients(fused, fused, data()), want, 1e-6)
    assert fused.enter.shared.joined_casts is None
    assert fused.attention.wq.weight_cache.casts is None if recipe else True


def test_scales_of_the_step_before_are_used_and_noted() -> None:
    plain = make("tensorwise_previous_step")
    fused = fuse(copy.deepcopy(plain))
    one, other = DelayedScaling(plain), DelayedScaling(fused)
    assert "delayed scaling" in fused.down.shared.why_separate()
    for seed in range(2):
        x = (1 + seed) * data()  # the second step's saturates
        assert_near(gradients(fused, fused, x), gradients(plain, plain, x), 1e-6)
        report = one.end_step()
        assert other.end_step().saturated == pytest.approx(report.saturated)
    assert not report.just_in_time
    assert report.saturated > 0


@pytest.mark.parametrize("recipe", [None, "rowwise", "blockwise"])
def test_joined_linears_are_one_product(recipe: str | None) -> None:
    fused = fuse(make(recipe))
    assert fused.enter.shared.why_separate() is None
    (q, k, v) = fused.enter(data())[1]
    assert q.value.untyped_storage().data_ptr() == v.value.untyped_storage().data_ptr()
    assert (q.value.shape, k.value.shape) == ((2, 24, 256), (2, 24, 128))


def test_what_cannot_be_joined_is_called_one_by_one() -> None:
    tensorwise = fuse(make("tensorwise"))
    assert "one scale" in tensorwise.enter.shared.why_separate()
    assert "straddle" in why_not_joined(RECIPES["blockwise"].output.b, [96, 128])
    hooked = fuse(make("rowwise"))
    seen = []
    hooked.attention.wk.register_forward_hook(lambda *args: seen.append(args))
    assert "hooks" in hooked.enter.shared.why_separate()
    hooked(data())
    assert len(seen) == 1
    kept = fuse(make("rowwise"))
    kept.attention.wq.statistics = ()
    assert "delayed scaling" in kept.enter.shared.why_separate()
    mixed = make(None)
    convert_to_float8_training(
        mixed, config="rowwise", module_filter_fn=lambda module, fqn: not fqn.endswith("wk")
    )
    want = gradients(mixed, mixed, data())
    fused = fuse(mixed)
    assert "different recipes" in fused.enter.shared.why_separate()
    assert_near(gradients(fused, fused, data()), want, 1e-6)
    with pytest.raises(ValueError, match="one scale per weight"):
        fuse(make("rowwise"), shared_scales=True)
    with pytest.raises(ValueError, match="one in_features"):
        SharedInput([nn.Linear(4, 4), nn.Linear(5, 4)])


def test_a_recipe_a_layer_and_casts_without_scales() -> None:
    """Two of one input in one recipe, the third in another; and e5m2 as the negative control takes it."""
    control = RECIPES["tensorwise"].map_casts(lambda cast: replace(cast, scaled=False))
    for others, wk in (("rowwise", "blockwise"), ("tensorwise", "mxfp8"), ("control", "control")):
        plain = make(None)
        for recipe, is_wk in ((others, False), (wk, True)):
            options = Float8LinearConfig.from_recipe(RECIPES.get(recipe, control))
            convert_to_float8_training(
                plain,
                config=replace(options, emulate=True),
                module_filter_fn=lambda _, fqn, is_wk=is_wk: fqn.endswith("wk") == is_wk,
            )
        fused = fuse(copy.deepcopy(plain))
        assert fused.enter.shared.why_separate() is not None
        assert_near(gradients(fused, fused, data()), gradients(plain, plain, data()), 1e-6)


def test_one_scale_for_several_weights_costs_little() -> None:
    """The bound: a block's results are at most 1 dB further from high precision than tensorwise's own."""
    plain, fused = make("tensorwise"), fuse(make("tensorwise"), shared_scales=True)
    assert fused.enter.shared.why_separate() is None
    exact, want, got = (gradients(block, block, data()) for block in (make(None), plain, fused))
    for truth, one, other in zip(exact, want, got, strict=True):
        apart, shared = (20 * torch.log10(truth.norm() / (made - truth).norm()) for made in (one, other))
        assert shared > apart - 1
    assert not torch.equal(want[0], got[0])
    with cast_weights_once(fused):
        assert_near(gradients(fused, fused, data()), got, 0.0)


@pytest.mark.parametrize("recipe", [None, "rowwise", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_is_kept_for_backward(recipe: str | None, dtype: torch.dtype) -> None:
    plain = make(recipe, dtype)
    x = data(dtype).requires_grad_()
    want = saved_bytes(lambda x: plain(x * 1.0), x, plain)
    fused = fuse(plain)
    assert saved_bytes(lambda x: fused(x * 1.0), x, fused) <= want


@compiles
def test_compiled_in_one_graph() -> None:
    """For a float8 recipe see `kernels/interpreted/test_fused.py`."""
    graphs = compile_and_capture(fuse(make(None)), data().requires_grad_())
    assert len(graphs.forward) == len(graphs.backward) == 1


def test_gradients_asked_for_separately_take_each_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As zero-bubble pipelines do: 3 products for 3 weights' inputs, then 3 for the weights."""
    from octavo.float8 import product

    calls = []
    multiply = product.matmul
    monkeypatch.setattr(product, "matmul", lambda *a, **k: calls.append(a[2]) or multiply(*a, **k))
    block = make("rowwise")
    shared = SharedInput([block.attention.wq, block.attention.wk, block.attention.wv])
    x = (data() * 1.0).requires_grad_()
    total = sum(made.value.sum() for made in shared(x * 1.0))
    weights = [linear.weight for linear in shared.linears]
    assert len(calls) == 1
    torch.autograd.grad(total, [x], retain_graph=True)
    assert len(calls) == 4
    torch.autograd.grad(total, weights)
    assert len(calls) == 7
    assert calls[4:] == [RECIPES["rowwise"].grad_weight] * 3


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_health_sees_fused_linears(compiled: bool) -> None:
    fused = Half(make("rowwise")) if compiled else fuse(make("rowwise"))
    run = fused
    if compiled:  # traced before the step that is measured; no code is generated
        torch._dynamo.reset()
        run = torch.compile(fused, backend="eager", fullgraph=True)
        gradients(run, fused, data())
    monitor = Monitor(fused, every=1)
    with monitor.step():
        gradients(run, fused, data())
    layers = {row.layer for row in monitor.table.rows}
    assert layers == {name for name, m in fused.named_modules() if isinstance(m, nn.Linear)}


def test_bias_and_odd_shapes() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(16, 5), nn.Linear(16, 7)
    shared = SharedInput([first, second])
    for shape in ((16,), (0, 16), (2, 3, 16)):
        x = torch.randn(shape)
        for made, linear in zip(shared(x), (first, second), strict=True):
            torch.testing.assert_close(made.value, linear(x))
    with pytest.raises(ValueError, match=r"Linear takes \[..., 16\]"):
        shared(torch.randn(2, 17))


def test_copies_have_no_casts_and_refer_to_their_own_object() -> None:
    fused = fuse(make("rowwise"))
    plain = len(pickle.dumps(fused))
    with cast_weights_once(fused):
        copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
        assert len(pickle.dumps(fused)) == plain
    for copied in copies:
        assert copied.enter.shared.joined_casts is None
        assert copied.attention.wq.shared_input is copied.enter.shared
        assert_near(gradients(copied, copied, data()), gradients(fused, fused, data()), 0.0)
    assert copy.deepcopy(fused.attention.wq).shared_input is None


def test_a_part_of_a_shared_input_is_cast_alone() -> None:
    fused = fuse(make("rowwise"))
    with cast_weights_once(fused.attention.wq):
        assert fused.attention.wq.weight_cache.active
        assert fused.attention.wk.weight_cache.casts is None
