"""Float8Linear: unusual inputs, tensors saved for backward, and otherwise the behaviour of nn.Linear."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from octavo.float8 import (
    RECIPES,
    Cast,
    EmulationWarning,
    Float8Linear,
    Float8LinearConfig,
    Gemm,
    Recipe,
    convert_to_float8_training,
)
from octavo.float8.casts import input_cache
from octavo.float8.matmul import PRODUCTS
from tests.float8.graphs import FLOAT8, gradients, saved_bytes, saved_tensors
from tests.float8.llama_block import LlamaBlock
from tests.float8.torchao_reference import relative

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SQNR_DB = 20  # torchao's own bar for a float8 layer against high precision


def linear(recipe: Any = "rowwise", K: int = 64, N: int = 48, **kwargs: Any) -> Float8Linear:
    torch.manual_seed(0)
    return Float8Linear(K, N, config=recipe, emulate=True, **kwargs)


def sqnr(got: Tensor, want: Tensor) -> float:
    return -20 * torch.log10(torch.tensor(relative(got, want))).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_close_to_high_precision(recipe: str, dtype: torch.dtype) -> None:
    ours = linear(recipe, 256, 192, dtype=dtype)
    plain = nn.Linear(256, 192, dtype=dtype)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 40, 256).to(dtype)
    for got, want in zip(gradients(ours, ours, x), gradients(plain, plain, x), strict=True):
        assert got.dtype == want.dtype
        assert sqnr(got, want) > SQNR_DB


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_zero_tokens(recipe: str, shape: tuple[int, ...]) -> None:
    model = linear(recipe)
    x = torch.empty(shape, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 48)
    assert x.grad.shape == shape
    assert torch.equal(model.weight.grad, torch.zeros(48, 64))
    assert torch.equal(model.bias.grad, torch.zeros(48))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (2, 3, 5, 64), (2, 1, 3, 5, 64)])
def test_any_number_of_dimensions(recipe: str, shape: tuple[int, ...]) -> None:
    model = linear(recipe)
    x = torch.randn(shape)
    y, dx, dw, db = gradients(model, model, x)
    assert y.shape == (*shape[:-1], 48)
    flat = gradients(model, model, x.reshape(-1, 64))
    assert torch.equal(y.reshape(-1, 48), flat[0])
    assert dx.shape == x.shape
    if len(shape) == 2:
        assert all(torch.equal(a, b) for a, b in zip((y, dx, dw, db), flat, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_inputs_that_are_not_contiguous(recipe: str, layout: str) -> None:
    model = linear(recipe)
    x = {
        "transposed": torch.randn(64, 6, 4).transpose(0, 2),
        "strided": torch.randn(4, 12, 128)[:, ::2, ::2],
        "expanded": torch.randn(1, 6, 64).expand(4, 6, 64),
    }[layout]
    assert not x.is_contiguous()
    assert torch.equal(model(x), model(x.contiguous()))


@pytest.mark.parametrize("emulate", [True, False])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (17, 33, 65), (3, 130, 7), (129, 16, 1)])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_sizes_that_are_not_multiples_of_16(recipe: str, M: int, K: int, N: int, emulate: bool) -> None:
    torch.manual_seed(0)
    ours = Float8Linear(K, N, config=recipe, emulate=emulate)
    plain = nn.Linear(K, N)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(M, K)
    for got, want in zip(gradients(ours, ours, x), gradients(plain, plain, x), strict=True):
        assert sqnr(got, want) > SQNR_DB


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (17, 33, 65), (129, 130, 131)])
def test_sizes_that_are_not_multiples_of_the_block(recipe: str, M: int, K: int, N: int) -> None:
    ours = linear(recipe, K, N)
    plain = nn.Linear(K, N)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(M, K)
    for got, want in zip(gradients(ours, ours, x), gradients(plain, plain, x), strict=True):
        assert sqnr(got, want) > SQNR_DB


@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_sets_the_dtype_and_narrows_no_product(recipe: str) -> None:
    model = linear(recipe)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    assert model.weight.grad.dtype == torch.float32
    # The same as casting the input by hand: autocast must not turn emulation's float32 products into bfloat16
    # ones.
    by_hand = model(x.detach().bfloat16())
    assert torch.equal(y, by_hand)


class Products(TorchDispatchMode):
    """Counts matrix products and conversions to float8."""

    def __init__(self) -> None:
        super().__init__()
        self.mm = self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.mm += func in PRODUCTS
        if isinstance(out, Tensor) and out.dtype in FLOAT8:
            self.casts += args[0].dtype not in (*FLOAT8, torch.uint8)
        return out


@pytest.mark.parametrize(
    ("frozen", "products", "casts"),
    # tensorwise: x, w and dy are one cast each, and w another in backward
    [("nothing", 3, 4), ("weight", 2, 4), ("input", 2, 3), ("both", 1, 2)],
)
def test_frozen_operands_cost_nothing(frozen: str, products: int, casts: int) -> None:
    model = linear("tensorwise", bias=frozen != "both")
    model.weight.requires_grad_(frozen in ("nothing", "input"))
    x = torch.randn(5, 64, requires_grad=frozen in ("nothing", "weight"))
    with Products() as count:
        y = model(x)
        if y.requires_grad:
            y.sum().backward()
    if frozen == "both":
        assert not y.requires_grad
    assert (count.mm, count.casts) == (products, casts)
    assert (x.grad is None) == (frozen in ("input", "both"))
    assert (model.weight.grad is None) == (frozen in ("weight", "both"))


def test_a_frozen_weight_keeps_no_input() -> None:
    model = linear("rowwise", bias=False)
    model.weight.requires_grad_(False)
    assert saved_bytes(model, torch.randn(5, 64, requires_grad=True), model) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_differentiating_twice_is_a_clear_error(recipe: str) -> None:
    model = linear(recipe)
    x = torch.randn(5, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.functional.hvp(lambda x: model(x).square().sum(), x.detach(), torch.ones(5, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_and_inf_stay_visible(recipe: str, value: float) -> None:
    model = linear(recipe, 256, 192, bias=False)
    x = torch.randn(150, 256)
    x[3, 5] = value
    y, dx, dw = gradients(model, model, x)
    assert not bool(y[3].isfinite().any())
    assert not bool(dw[:, 5].isfinite().any())
    assert bool(dx.isfinite().all())

    x = torch.randn(150, 256, requires_grad=True)
    dy = torch.randn(150, 192)
    dy[3, 5] = value
    model.zero_grad()
    model(x).backward(dy)
    assert not bool(x.grad[3].isfinite().any())
    assert not bool(model.weight.grad[5].isfinite().any())


def test_wrong_shapes_and_dtypes_are_named() -> None:
    model = linear()
    # 32 x 2 elements would make one row of 64: a reshape must not hide it.
    with pytest.raises(ValueError, match="in_features=64"):
        model(torch.randn(2, 32))
    with pytest.raises(ValueError, match="in_features=64"):
        model(torch.tensor(1.0))
    for dtype in (torch.int64, torch.float64):
        with pytest.raises(TypeError, match=str(dtype)):
            model(torch.ones(2, 64, dtype=dtype))


def test_an_unsupported_device_warns_once_or_raises() -> None:
    from octavo.float8 import matmul

    x = torch.randn(4, 64)
    matmul._warned.clear()
    model = Float8Linear(64, 48, config="blockwise")
    with pytest.warns(EmulationWarning, match="blockwise.*emulation"):
        model(x)
    model(x)  # a second warning would be an error
    with pytest.raises(ValueError, match="emulate=False"):
        Float8Linear(64, 48, config="blockwise", emulate=False)(x)
    with pytest.raises(ValueError, match="emulate=False"):
        convert_to_float8_training(
            nn.Linear(64, 48), config=replace(Float8LinearConfig.from_recipe_name("mxfp8"), emulate=False)
        )


def test_a_recipe_of_ones_own_trains() -> None:
    fine = Cast(torch.float8_e5m2, (1, 16))
    coarse = Cast(torch.float8_e4m3fn, (8, 64))
    recipe = Recipe("mine", Gemm(None, None), Gemm(fine, coarse), Gemm(fine, coarse, fast_accum=True))
    ours, plain = linear(recipe, 256, 192), nn.Linear(256, 192)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(40, 256)
    got, want = gradients(ours, ours, x), gradients(plain, plain, x)
    assert relative(got[0], want[0]) < 1e-6
    for a, b in zip(got[1:], want[1:], strict=True):
        assert sqnr(a, b) > SQNR_DB


# ----------------------------------------------------------------------------------------- memory and sharing


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "rowwise_with_gw_hp"])
def test_half_of_bfloat16_is_saved(recipe: str) -> None:
    plain = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    ours = linear(recipe, 512, 512, bias=False, dtype=torch.bfloat16)
    x = torch.randn(512, 512, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(ours, x * 1, ours) <= 0.55 * saved_bytes(plain, x * 1, plain)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "rowwise_with_gw_hp"])
def test_a_block_saves_each_distinct_input_once_in_float8(recipe: str) -> None:
    torch.manual_seed(0)
    plain = LlamaBlock().bfloat16()
    ours = copy.deepcopy(plain)
    convert_to_float8_training(
        ours, config=replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    )
    x = torch.randn(2, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(ours, x * 1, ours) <= 0.90 * saved_bytes(plain, x * 1, plain)
    sizes = sorted(t.numel() for t in saved_tensors(ours, x * 1, ours) if t.dtype in FLOAT8)
    assert sizes == [512 * 256] * 3 + [512 * 768]  # q/k/v, o, w1/w3, w2


def test_linears_with_one_input_share_its_cast() -> None:
    a, b = linear("rowwise", bias=False), linear("rowwise", bias=False)
    x = torch.randn(5, 64, requires_grad=True) * 1
    with Products() as count:
        a(x), b(x)
    assert count.casts == 2 + 2  # x as row and as column, and each weight
    with Products() as count:
        a(x), b(x.clone())
    assert count.casts == 2 + 2  # x's are remembered
    x.mul_(2)
    with Products() as count:
        y = a(x)
    assert count.casts == 3
    assert torch.equal(y, a(x.clone()))


def test_shared_casts_differ_where_the_recipes_do() -> None:
    x = torch.randn(40, 256)
    for recipe in RECIPES:
        model = linear(recipe, 256, 64)
        assert torch.equal(model(x), model(x.clone()))
        with torch.no_grad():
            assert torch.equal(model(x), model(x.clone()))


def test_remembered_casts_die_with_their_input() -> None:
    x = torch.randn(5, 64, requires_grad=True) * 1
    linear("rowwise")(x)
    assert input_cache._last is not None
    assert input_cache._last.tensor() is x
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    assert input_cache._last is None


def test_one_inputs_casts_are_remembered_at_most() -> None:
    """Whoever keeps inputs (activation checkpointing, a batch used again) keeps no casts of them."""
    model = linear("rowwise", bias=False)
    inputs = [torch.randn(5, 64, requires_grad=True) * 1 for _ in range(3)]
    with Products() as count:
        for x in inputs:
            model(x)
            model(x)
    once = count.casts
    with Products() as count:
        model(inputs[0])
    assert input_cache._last is not None
    assert input_cache._last.tensor() is inputs[0]
    assert count.casts == 2 + 1  # as row and as column; the weight
    assert once == 3 * (2 + 2)


def test_external_memory_is_cast_again() -> None:
    """A pipeline's receive buffer, or numpy's memory, changes without a new version."""
    memory = np.ones((5, 64), dtype=np.float32)
    x = torch.from_numpy(memory).requires_grad_()
    model = linear("rowwise", bias=False)
    model(x)
    memory[:] = 0
    assert torch.equal(model(x), torch.zeros(5, 48))


def test_gradients_asked_for_one_at_a_time_cost_one_product_each() -> None:
    """As zero-bubble pipeline schedules do: input gradients first, weight gradients later, over one graph."""
    model = linear("rowwise", bias=False)
    x = torch.randn(5, 64, requires_grad=True)
    together = torch.autograd.grad(model(x * 1).square().sum(), (x, model.weight))
    y = model(x * 1).square().sum()
    with Products() as count:
        (dx,) = torch.autograd.grad(y, x, retain_graph=True)
    assert count.mm == 1
    with Products() as count:
        (dw,) = torch.autograd.grad(y, model.weight)
    assert count.mm == 1
    assert torch.equal(dx, together[0])
    assert torch.equal(dw, together[1])


def test_the_repr_tells_the_casts_of_each_product() -> None:
    assert "recipe=rowwise, emulate=True" in repr(linear())
    assert repr(Float8Linear(64, 32, config="blockwise")) == (
        "Float8Linear(in_features=64, out_features=32, bias=True, recipe=blockwise, "
        "output=e4m3[1 x 128] . e4m3[128 x 128], grad_input=e4m3[1 x 128] . e4m3[128 x 128], "
        "grad_weight=e4m3[1 x 128] . e4m3[1 x 128])"
    )
    mixed = repr(Float8Linear(64, 32, config="rowwise_with_gw_hp", emulate=False))
    assert "emulate=False, output=e4m3[1 x FULL] . e4m3[1 x FULL]" in mixed
    assert "grad_input=e4m3[1 x FULL] . e4m3[FULL x FULL], grad_weight=high precision)" in mixed
    assert "grad_input=e5m2[FULL x FULL] . e4m3" in repr(Float8Linear(64, 32, config="tensorwise"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpointing_may_save_the_products(recipe: str) -> None:
    """What it saves must not change later, as by scales that are applied in place."""
    layer = Float8Linear(48, 32, config=recipe, emulate=True)
    x = torch.randn(20, 48, requires_grad=True)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def run(x: Tensor) -> Tensor:
        return layer(torch.sin(x)).square()

    want = torch.autograd.grad(run(x).sum(), (x, layer.weight))
    got = torch.autograd.grad(
        checkpoint(run, x, use_reentrant=False, context_fn=contexts).sum(), (x, layer.weight)
    )
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
