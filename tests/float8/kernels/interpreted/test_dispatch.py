"""Float8 linears with kernels in place of PyTorch's casts: the same bits, eager and compiled."""

from __future__ import annotations

import copy

import pytest
import torch

from octavo.float8 import RECIPES, Cast, Float8AdamW, Float8Linear, ScaleFormat
from octavo.float8.casts import gpu_cast
from octavo.float8.casts.delayed_scaling import DelayedScaling
from octavo.float8.casts.delayed_statistics import OperandStatistics, quantize_operand
from octavo.float8.casts.gpu_cast import supports, use_kernels
from octavo.float8.casts.operands import cast_weight, cast_weights
from octavo.float8.distributed.fsdp_shards import ShardLayout, cast_shard
from octavo.float8.distributed.tp_scales import ShardedAxis
from octavo.float8.quantize import Quantized, block_amax, quantize, quantize_both
from octavo.float8.recipe import FULL
from tests.float8.graphs import FLOAT8, WITHOUT_CODE, compile_and_capture, compiles, gradients
from tests.float8.kernels.against_reference import E4M3, assert_same, make_x

pytestmark = compiles


@pytest.fixture(autouse=True)
def _kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cast, "_device_supported", lambda device: True)
    torch._dynamo.reset()


COMPILED = ("rowwise", "mxfp8", "tensorwise_previous_step")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_computes_the_same(recipe: str) -> None:
    torch.manual_seed(0)
    model = Float8Linear(64, 48, config=recipe, emulate=True, dtype=torch.bfloat16)
    x = torch.randn(2, 20, 64).to(torch.bfloat16)
    with use_kernels(False):
        want = gradients(model, model, x)
    runs = [model]
    if recipe in COMPILED:
        runs.append(torch.compile(model, fullgraph=True, backend=WITHOUT_CODE))
    for run in runs:
        for got, wanted in zip(gradients(run, model, x), want, strict=True):
            assert_same(got, wanted, recipe)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_compiled_code_keeps_the_transposed_cast(recipe: str) -> None:
    model = Float8Linear(64, 48, config=recipe, emulate=True, bias=False, dtype=torch.bfloat16)
    graphs = compile_and_capture(model, torch.randn(32, 64).to(torch.bfloat16).requires_grad_())
    sizes = [t.numel() for t in graphs.saved() if t.dtype in FLOAT8]
    assert sizes == [32 * 64]
    assert not any(t.dtype == torch.bfloat16 and t.numel() == 32 * 64 for t in graphs.saved())


@pytest.mark.parametrize("cast", [c for r in RECIPES.values() for g in r.gemms.values() for c in (g.a,) if c])
def test_kernels_write_along_the_contraction(cast: Cast) -> None:
    x = make_x((40, 70), torch.bfloat16, "spread")
    first, second = quantize_both(x, cast, cast)
    both = (first, second, quantize(x, cast), quantize(x.t(), cast))
    with use_kernels(False):
        want = (quantize(x, cast), quantize(x.t(), cast)) * 2
    for got, wanted in zip(both, want, strict=True):
        assert isinstance(got, Quantized)
        assert got.data.is_contiguous()
        assert_same(got.data, wanted.data, "data")
        assert_same(got.scale, wanted.scale, "scale")


def test_what_kernels_leave_to_pytorch() -> None:
    x = torch.randn(8, 8)
    row, other = Cast(E4M3, (1, FULL), ScaleFormat.POW2), Cast(E4M3, (4, 8))
    assert supports(x, row)
    assert not supports(x, other)
    assert not supports(x.double(), row)
    assert not supports(x[:0], row)
    with use_kernels(False):
        assert not supports(x, row)
    # The maximum of a row that is sharded over ranks needs communication; that of a whole row does not.
    assert not supports(x, row, ShardedAxis(1, "group"))
    assert supports(x, row, ShardedAxis(0, "group"))
    first, second = quantize_both(x, row, None)
    assert isinstance(first, Quantized)
    assert second.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_an_optimizers_step_by_kernels_makes_the_casts(recipe: str) -> None:
    torch.manual_seed(0)
    plain, model = (Float8Linear(70, 48, config=recipe, emulate=True, bias=False) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    one = torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False)
    other = Float8AdamW(model.parameters(), model=model, lr=1e-2)
    for seed in range(3):
        grad = torch.randn(48, 70, generator=torch.Generator().manual_seed(seed))
        plain.weight.grad, model.weight.grad = grad.clone(), grad.clone()
        one.step()
        other.step()
        assert model.weight_cache.is_current(model.weight)
        casts = model.weight_cache.casts
        assert torch.equal(model.weight.grad, grad)
        with use_kernels(False):
            want = cast_weight(model.weight.detach(), model.recipe, for_grad_input=True)
        for got, wanted in zip(casts, want, strict=True):
            assert got is not None
            assert wanted is not None
            assert_same(got.data, wanted.data, "data")
            assert_same(got.scale, wanted.scale, "scale")
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-6, atol=1e-6)
    assert one.state_dict()["state"].keys() == other.state_dict()["state"].keys()
    for name, value in one.state[plain.weight].items():
        torch.testing.assert_close(other.state[model.weight][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp", "blockwise", "mxfp8"])
@pytest.mark.parametrize("for_grad_input", [True, False])
def test_joined_weights_are_cast_as_each_is(recipe: str, for_grad_input: bool) -> None:
    weights = [make_x((rows, 160), torch.bfloat16, "spread", rows) for rows in (256, 128, 130)]
    joined, casts = cast_weights(weights, RECIPES[recipe], for_grad_input=for_grad_input)
    assert joined.data.shape == (514, 160)
    assert joined.data.data_ptr() == casts[0][0].data.data_ptr()
    for weight, got in zip(weights, casts, strict=True):
        want = cast_weight(weight, RECIPES[recipe], for_grad_input=for_grad_input)
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same(one.data, other.data, "data")
                assert_same(one.scale, other.scale, "scale")


@pytest.mark.parametrize("valid", [False, True])
def test_an_operand_of_the_previous_step_is_cast_and_measured_by_kernels(valid: bool) -> None:
    cast = RECIPES["tensorwise_previous_step"].output.a
    assert cast is not None
    x = make_x((70, 133), torch.bfloat16, "spread")
    results = []
    for kernels in (True, False):
        operand = OperandStatistics.on(x.device)
        operand.previous_amax.fill_(2.0)
        operand.valid = valid
        with use_kernels(kernels):
            first, second = quantize_operand(x, cast, cast, statistics=operand)
        assert isinstance(first, Quantized)
        assert isinstance(second, Quantized)
        results.append((first.data, first.scale, second.data, operand.current_amax, operand.counts.float()))
    for got, wanted in zip(*results, strict=True):
        assert_same(got, wanted, "part")


def test_known_scales_compile_where_the_input_is_not_pinned() -> None:
    """As w2 from the second step on: both forms of the cast go straight into the product."""
    torch.manual_seed(0)
    model = Float8Linear(64, 48, config="tensorwise_previous_step", emulate=True, dtype=torch.bfloat16)
    model.keep_input = False
    scales = DelayedScaling(model)
    x = torch.randn(2, 20, 64).to(torch.bfloat16)
    gradients(model, model, x)
    scales.end_step()
    assert model.statistics.input.valid

    want = gradients(model, model, x)
    compiled = torch.compile(model, fullgraph=True, backend=WITHOUT_CODE)
    for got, wanted in zip(gradients(compiled, model, x), want, strict=True):
        assert_same(got, wanted, "compiled")


def test_a_square_casts_two_forms_have_a_scale_tensor_each() -> None:
    x = make_x((32, 64), torch.bfloat16, "spread")
    cast = Cast(E4M3, (FULL, FULL))
    given = gpu_cast.cast_with_amax(x, x.abs().amax().float().view(1, 1), cast, True, True)[:2]
    for (_, one), (_, other) in (given, gpu_cast.cast_both(x, cast, cast)):
        assert one is not other


def test_the_step_count_is_read_once_and_again_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `fused=True` it is on the GPU, and reading it waits for the step before."""
    reads = []
    count = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda t: reads.append(1) or count(t))

    def train(optimizer: Float8AdamW, steps: int) -> None:
        for step in range(steps):
            model.weight.grad = torch.full_like(model.weight, 0.1 * (step + 1))
            optimizer.step()

    model = Float8Linear(16, 16, bias=False, config="rowwise", emulate=True)
    optimizer = Float8AdamW(model.parameters(), model=model, lr=1e-2)
    train(optimizer, 3)
    assert len(reads) == 1
    kept = copy.deepcopy(optimizer.state_dict())
    train(optimizer, 2)
    optimizer.load_state_dict(kept)
    train(optimizer, 1)
    assert len(reads) == 2
    assert optimizer.state[model.weight]["step"] == 4
    assert optimizer._steps[model.weight] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_shard_of_a_weight_is_cast_the_same(dtype: torch.dtype, rank: int) -> None:
    cast, layout = RECIPES["tensorwise"].output.b, ShardLayout(37, 24, 0, world=3, rank=rank)
    x = make_x((37, 24), torch.float32, "spread")
    shard = x[13 * rank : 13 * (rank + 1)]
    amax = block_amax(x, (FULL, FULL))
    with use_kernels(False):
        want = cast_shard(shard.to(dtype), amax, layout, cast)
    for got, wanted in zip(cast_shard(shard.to(dtype), amax, layout, cast), want, strict=True):
        assert torch.equal(got, wanted)
