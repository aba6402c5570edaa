"""Float8 linears with kernels in place of PyTorch's casts: the same bits, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from octavo.float8 import RECIPES, Cast, Float8Linear, ScaleFormat, cast_on_gpu
from octavo.float8.cast_on_gpu import serves, use_kernels
from octavo.float8.quantize import Quantized, quantize, quantize_both
from octavo.float8.recipe import FULL
from octavo.float8.split import Split
from tests.float8.graphs import FLOAT8, compile_and_capture, compiles
from tests.float8.kernels.against_reference import E4M3, assert_same, make_x

pytestmark = compiles


@pytest.fixture(autouse=True)
def _kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast_on_gpu, "_device_serves", lambda device: True)
    torch._dynamo.reset()


def gradients(run: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_computes_the_same(recipe: str) -> None:
    torch.manual_seed(0)
    model = Float8Linear(64, 48, config=recipe, emulate=True, dtype=torch.bfloat16)
    x = torch.randn(2, 20, 64).to(torch.bfloat16)
    with use_kernels(False):
        want = gradients(model, model, x)
    for run in (model, torch.compile(model, fullgraph=True)):
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
    assert serves(x, row)
    assert not serves(x, other)
    assert not serves(x.double(), row)
    assert not serves(x[:0], row)
    with use_kernels(False):
        assert not serves(x, row)
    # A row that ranks share has a maximum none of them knows; a column that they share in whole has none.
    assert not serves(x, row, Split(1, "group"))
    assert serves(x, row, Split(0, "group"))
    first, second = quantize_both(x, row, None)
    assert isinstance(first, Quantized)
    assert second.data_ptr() == x.data_ptr()
