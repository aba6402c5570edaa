"""An `UnshardedWeight` acts as a parameter, gives its casts to a linear, and refuses other uses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.float8 import RECIPES, Float8Linear
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.quantize import dequantize, quantize
from tests.float8.graphs import compile_and_capture, compiles

RECIPE_NAMES = ["tensorwise", "blockwise"]


def carry(w: Tensor, recipe: str) -> UnshardedWeight:
    cast = RECIPES[recipe].output.b
    assert cast is not None
    q = quantize(w, cast)
    return UnshardedWeight(q.data.contiguous(), q.scale, w.dtype, cast)


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(192, 160, generator=torch.Generator().manual_seed(0)).to(dtype)


def linears(recipe: str, dtype: torch.dtype) -> tuple[Float8Linear, Float8Linear]:
    """A linear with a plain weight, and one that carries the same weight in float8."""
    pair = []
    for carried in (False, True):
        linear = Float8Linear(160, 192, config=recipe, emulate=True, dtype=dtype)
        linear.bias.data.fill_(0.5)
        w = weight(dtype)
        linear.weight = nn.Parameter(carry(w, recipe) if carried else w)
        pair.append(linear)
    return pair[0], pair[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_linear_multiplies_with_what_it_carries(recipe: str, dtype: torch.dtype) -> None:
    plain, carried = linears(recipe, dtype)
    x = torch.randn(3, 16, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for linear in (plain, carried):
        x.grad = None
        y = linear(x.requires_grad_())
        y.sum().backward()
        results.append([y.detach(), x.grad, linear.weight.grad, linear.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert type(carried.weight.grad) is Tensor
    assert carried.weight.grad.dtype == carried.weight.dtype == dtype


@compiles
def test_compiled_in_one_graph_that_does_not_cast_the_weight() -> None:
    _, carried = linears("blockwise", torch.float32)
    gradients = []
    for compiled in (False, True):
        carried.zero_grad()
        x = torch.randn(16, 160, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if compiled:
            graphs = compile_and_capture(carried, x)
        else:
            carried(x).sum().backward()
        gradients.append([x.grad, carried.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    casts = [*graphs.casts("forward"), *graphs.casts("backward")]
    # In tiles of whole 128-blocks; the input, twice, and the output's gradient, twice, are smaller.
    assert len(casts) == 4
    assert all(torch.Size(shape).numel() < 192 * 160 for shape in casts)


def test_views_that_keep_the_shape_stay_carriers() -> None:
    carrier = carry(weight(), "blockwise").requires_grad_()
    views = [
        carrier.detach(),
        carrier.view_as(carrier),
        carrier.view(192, -1),
        carrier.as_strided((192, 160), (160, 1)),
        nn.Parameter(carrier),
    ]
    for view in views:
        assert isinstance(view, UnshardedWeight)
        assert view.shape == (192, 160)
        assert view.data_fp8.data_ptr() == carrier.data_fp8.data_ptr()
        assert view.scale is carrier.scale
    assert torch.equal(torch.zeros_like(carrier), torch.zeros(192, 160))


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: w.t(),
        lambda w: w.view(-1),
        lambda w: w.view(160, 192),
        lambda w: w[:10],
        lambda w: w.as_strided((10, 160), (160, 1)),
        lambda w: w.bfloat16(),
        lambda w: w.clone(),
        lambda w: w.sum(),
        lambda w: w.mul_(2),
        lambda w: torch.zeros(192, 160).copy_(w),
        lambda w: F.linear(torch.zeros(1, 160), w),
        lambda w: F.embedding(torch.zeros(1, dtype=torch.long), w),
    ],
)
def test_all_else_is_refused_with_the_remedy(use) -> None:
    with pytest.raises(NotImplementedError, match="enable_fsdp_float8_all_gather=False"):
        use(carry(weight(), "tensorwise"))


def test_dequantize_gives_the_values() -> None:
    w = weight(torch.bfloat16)
    carrier = carry(w, "blockwise")
    cast = carrier.cast
    assert carrier.dequantize().dtype == torch.bfloat16
    assert torch.equal(carrier.dequantize(), dequantize(quantize(w, cast), cast.block).bfloat16())
    assert "dtype=torch.bfloat16" in repr(carrier)


def test_comes_apart_and_together_for_the_compiler() -> None:
    carrier = carry(weight(torch.bfloat16), "blockwise")
    names, context = carrier.__tensor_flatten__()
    inner = {name: getattr(carrier, name) for name in names}
    again = UnshardedWeight.__tensor_unflatten__(inner, context, carrier.shape, carrier.stride())
    assert (again.dtype, again.shape, again.cast) == (carrier.dtype, carrier.shape, carrier.cast)
    assert torch.equal(again.dequantize(), carrier.dequantize())
