"""Grouped products equal one linear layer per group: the same casts, whatever the other groups hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from octavo.float8 import (
    RECIPES,
    Float8GroupedMM,
    Float8Linear,
    convert_from_float8_training,
    convert_to_float8_training,
)
from octavo.float8.grouped import why_not_grouped
from tests.float8.graphs import FLOAT8, WITHOUT_CODE, compile_and_capture, compiles

GROUPED = ("rowwise", "blockwise", "mxfp8")
SIZES = ([3, 0, 40, 21], [0, 0, 64, 0], [0, 0, 0, 1], [130, 1, 2, 0])


def operands(sizes: list[int], N: int = 48, K: int = 160) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, ends and dy, with outliers, so that a scale shared by too many would show."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(sizes), size, generator=draw) for size in (K, N))
    for tensor in (x, dy):
        tensor.mul_(torch.exp2(torch.randint(-4, 5, (tensor.shape[0], 1), generator=draw).float()))
    w = torch.randn(len(sizes), N, K, generator=draw)
    w.mul_(torch.exp2(torch.randint(-4, 5, (len(sizes), N, 1), generator=draw).float()))
    return x.requires_grad_(), w.requires_grad_(), torch.tensor(sizes).cumsum(0).int(), dy


def one_by_one(recipe: str, x: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
    def linear(part: Tensor, weight: Tensor) -> Tensor:
        layer = Float8Linear(w.shape[2], w.shape[1], bias=False, config=recipe, emulate=True)
        return torch.func.functional_call(layer, {"weight": weight}, (part,))

    return torch.cat([linear(part, weight) for part, weight in zip(x.split(sizes), w, strict=True)])


@pytest.mark.parametrize("recipe", GROUPED)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_group_is_a_linear_layer(recipe: str, sizes: list[int]) -> None:
    x, w, ends, dy = operands(sizes)
    results = []
    for y in (Float8GroupedMM(recipe)(x, w, ends), one_by_one(recipe, x, w, sizes)):
        results.append((y, *torch.autograd.grad(y, (x, w), dy)))
    for got, want in zip(*results, strict=True):
        assert float((got - want).detach().norm()) <= 1e-6 * float(want.detach().norm())


@pytest.mark.parametrize("recipe", GROUPED)
def test_close_to_high_precision(recipe: str) -> None:
    sizes = [64, 96, 0, 32]
    x, w, ends, dy = operands(sizes, 96, 128)
    with torch.no_grad():
        w.copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    exact = torch.cat([part @ weight.t() for part, weight in zip(x.split(sizes), w, strict=True)])
    y = Float8GroupedMM(recipe)(x, w, ends)
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, w), dy)),
        (exact, *torch.autograd.grad(exact, (x, w), dy)),
        strict=True,
    )
    for got, want in pairs:
        assert 20 * torch.log10(want.norm() / (got - want).norm()) > 20


@compiles
@pytest.mark.parametrize("recipe", GROUPED)
def test_compiled_equals_eager_and_keeps_float8(recipe: str) -> None:
    product = Float8GroupedMM(recipe)

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(operands([40, 24])[1].detach())
            self.register_buffer("ends", torch.tensor([40, 64]).int())

        def forward(self, x: Tensor) -> Tensor:
            return product(x * 1.0, self.w, self.ends)

    model, x = Experts(), operands([40, 24])[0]
    graphs = compile_and_capture(model, x)
    wide = [t for t in graphs.saved() if t.numel() >= x.numel() and t.shape != model.w.shape]
    assert [t.dtype in FLOAT8 for t in wide] == [True]
    eager, compiled = (
        torch.autograd.grad(run(x).square().sum(), (x, model.w))
        for run in (model, torch.compile(model, fullgraph=True, backend=WITHOUT_CODE))
    )
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


def test_nan_stays_in_its_group() -> None:
    x, w, ends, dy = operands([4, 5, 3, 2])
    with torch.no_grad():
        x[5, 7] = float("nan")
    y = Float8GroupedMM("rowwise")(x, w, ends)
    (dw,) = torch.autograd.grad(y, (w,), dy)
    assert y.isnan().any(dim=1).tolist() == [row == 5 for row in range(14)]
    assert dw.isnan().flatten(1).any(dim=1).tolist() == [False, True, False, False]


class Experts(torch.nn.Module):
    """A user's module with grouped weights."""

    grouped_weights = ("w",)

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(3, 32, 16))
        self.product = high_precision


def high_precision(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    raise NotImplementedError


def test_conversion_replaces_the_product_and_puts_it_back() -> None:
    model = torch.nn.ModuleDict({"moe": Experts(), "head": torch.nn.Linear(16, 16)})
    convert_to_float8_training(model, config="rowwise", module_filter_fn=lambda _, fqn: fqn == "moe")
    assert repr(model["moe"].product) == "Float8GroupedMM(recipe=rowwise)"
    assert type(model["head"]) is torch.nn.Linear
    copied = copy.deepcopy(model["moe"])
    x, ends = torch.randn(5, 16), torch.tensor([2, 2, 5]).int()
    assert torch.equal(copied.product(x, copied.w, ends), model["moe"].product(x, model["moe"].w, ends))
    convert_from_float8_training(model)
    assert model["moe"].product is high_precision
    with pytest.warns(UserWarning, match="left the experts of 1 layers unconverted: recipe 'tensorwise'"):
        convert_to_float8_training(model, config="tensorwise")
    assert model["moe"].product is high_precision


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in GROUPED])
def test_recipes_with_one_scale_per_tensor_are_refused(recipe: str) -> None:
    assert why_not_grouped(RECIPES[recipe])
    with pytest.raises(ValueError, match="use rowwise, blockwise or mxfp8"):
        Float8GroupedMM(recipe)


def test_shapes_and_dtypes_are_checked() -> None:
    x, w, ends, _ = operands([3, 4])
    with pytest.raises(ValueError, match=r"\(7, 159\)"):
        Float8GroupedMM()(x[:, 1:], w, ends)
    with pytest.raises(TypeError, match="float64"):
        Float8GroupedMM()(x.double(), w, ends)
    for wrong in ([3, 6], [3, 9], [8, 7], [-1, 7]):
        with pytest.raises(ValueError, match="end at the number of rows, 7"):
            Float8GroupedMM()(x, w, torch.tensor(wrong).int())
    with pytest.raises(TypeError, match=r"ends in int32; these are torch.float32 and torch.float32"):
        Float8GroupedMM()(x, w, ends.float())
