"""Swapping linears, and filtering them."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from octavo.float8 import (
    RECIPES,
    CastConfig,
    Float8GemmConfig,
    Float8Linear,
    Float8LinearConfig,
    Gemm,
    Recipe,
    auto_filter_for_recipe,
    convert_from_float8_training,
    convert_to_float8_training,
)
from tests.float8.graphs import compiles
from tests.float8.torchao_reference import torchao

ROOT = Path(__file__).resolve().parents[2]


def test_linears_are_swapped_in_place_and_keep_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 16, bias=False), nn.ReLU()))
    model.eval()
    before = dict(model.named_parameters())
    assert convert_to_float8_training(model) is model
    assert isinstance(model[0], Float8Linear)
    assert isinstance(model[1][0], Float8Linear)
    assert not model[0].training
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_a_root_linear_is_returned_swapped() -> None:
    linear = nn.Linear(16, 16)
    swapped = convert_to_float8_training(linear, config="rowwise")
    assert isinstance(swapped, Float8Linear)
    assert swapped.weight is linear.weight


def test_the_filter_sees_each_linear_with_its_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.ModuleDict({"c": nn.Linear(16, 16)})})
    seen = []
    convert_to_float8_training(
        model, module_filter_fn=lambda m, fqn: seen.append((type(m), fqn)) or fqn == "b.c"
    )
    assert seen == [(nn.Linear, "a"), (nn.Linear, "b.c")]
    assert [isinstance(m, Float8Linear) for m in (model["a"], model["b"]["c"])] == [False, True]


def test_a_linear_in_two_places_stays_one_and_tied_weights_stay_tied() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert_to_float8_training(model)
    assert model[0] is model[2]
    tied = nn.ModuleDict({"embed": nn.Embedding(32, 16), "out": nn.Linear(16, 32, bias=False)})
    tied["out"].weight = tied["embed"].weight
    convert_to_float8_training(tied)
    assert tied["out"].weight is tied["embed"].weight


@pytest.mark.parametrize(
    ("model", "accept", "message"),
    [
        (nn.Sequential(nn.ReLU()), None, "no nn.Linear"),
        (nn.Sequential(nn.Linear(16, 16)), lambda m, fqn: False, "accepted none of its 1"),
        (nn.Sequential(Float8Linear(16, 16)), None, "float8 already"),
    ],
)
def test_converting_nothing_warns(model: nn.Module, accept: object, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        convert_to_float8_training(model, module_filter_fn=accept)


def test_meta_models_convert() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where it will run is not known yet
        convert_to_float8_training(model, config="blockwise")
    assert model[0].weight.is_meta


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_automatic_filter_gives_reasons(recipe: str) -> None:
    keep = auto_filter_for_recipe(recipe, ["output"])
    with torch.device("meta"):
        wide, narrow, odd = nn.Linear(8192, 8192), nn.Linear(1024, 1024), nn.Linear(8192, 8200)
    assert keep(wide, "layers.0.w1")
    assert keep.why_not(wide, "layers.0.w1") is None
    assert "too small" in keep.why_not(narrow, "layers.0.wk")
    assert "multiples of 16" in keep.why_not(odd, "layers.0.w")
    assert "'output'" in keep.why_not(wide, "output")
    assert "ReLU" in keep.why_not(nn.ReLU(), "act")


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_automatic_filter_is_torchaos(recipe: str) -> None:
    mine, theirs = auto_filter_for_recipe(recipe, ["w9"]), torchao._auto_filter_for_recipe(recipe, ["w9"])
    sizes = [16, 1000, 1008, 1024, 1040, 2048, 2064, 4096, 4112, 8192]
    for K in sizes:
        for N in sizes:
            with torch.device("meta"):
                linear = nn.Linear(K, N)
            assert mine(linear, "w1") == theirs(linear, "w1"), (K, N)
            assert not mine(linear, "w9")


@compiles
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "float8_training.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 11
    assert min(losses[5:]) < losses[0] / 2


# ----------------------------------------------------------------- ---- unsupported linears


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 100 * super().forward(input)


def normed() -> nn.Linear:
    return nn.utils.parametrizations.weight_norm(nn.Linear(32, 16))


def pruned() -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(32, 16), "weight", amount=0.5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(32, 16), "is a Scaled with a forward of its own"),
        (normed, "computes its weight"),
        (pruned, "computes its weight"),
        (lambda: nn.LazyLinear(16), "has no sizes yet"),
    ],
)
def test_unsupported_linears_are_left_with_a_warning(make: Any, reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(16, 8))
    first = model[0]
    x = torch.randn(4, 32)
    before = first(x) if not isinstance(first, nn.LazyLinear) else None
    with pytest.warns(UserWarning, match=f"left 1 linear layers unconverted: 0 {reason}"):
        convert_to_float8_training(model, config="rowwise")
    assert model[0] is first
    assert isinstance(model[1], Float8Linear)
    if before is not None:
        assert torch.equal(first(x), before)


def test_attention_that_never_calls_its_projection_keeps_it() -> None:
    model = nn.MultiheadAttention(32, 2)
    with pytest.warns(UserWarning, match="out_proj belongs to an nn.MultiheadAttention"):
        convert_to_float8_training(model)
    assert not any(isinstance(m, Float8Linear) for m in model.modules())


def test_a_subclass_that_computes_the_same_is_converted() -> None:
    class Named(nn.Linear):
        pass

    assert isinstance(convert_to_float8_training(Named(32, 16)), Float8Linear)


def test_hooks_buffers_and_attributes_go_along() -> None:
    linear = nn.Linear(32, 16)
    linear.register_buffer("steps", torch.ones(3))
    linear.note = "mine"
    seen = []
    linear.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    new = convert_to_float8_training(nn.Sequential(linear))[0]
    new(torch.randn(4, 32))
    assert new.note == "mine"
    assert set(new.state_dict()) == {"weight", "bias", "steps"}
    assert seen == [Float8Linear]


def test_a_filter_that_raises_leaves_the_model_as_it_was() -> None:
    def picky(module: nn.Module, fqn: str) -> bool:
        if fqn == "2":
            raise KeyError(fqn)
        return True

    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    with pytest.raises(KeyError):
        convert_to_float8_training(model, module_filter_fn=picky)
    assert not any(isinstance(m, Float8Linear) for m in model.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert_to_float8_training([nn.Linear(16, 16)]), "torch.nn.Module, not a list"),
        (lambda: convert_to_float8_training(nn.Linear(16, 16), config=3), "config is a int"),
        (lambda: convert_to_float8_training(nn.ReLU(), config="rowise"), "rowise"),
        (
            lambda: convert_to_float8_training(nn.Linear(2, 2), module_filter_fn="output"),
            "module_filter_fn is a str",
        ),
        (lambda: auto_filter_for_recipe("rowwise", "output"), r"give a list, \['output'\]"),
        (lambda: Float8Linear.from_float(nn.ReLU()), "takes an nn.Linear, not a ReLU"),
        (lambda: CastConfig("disabled"), "scaling_type is 'disabled'; it must be a ScalingType"),
        (lambda: CastConfig(scaling_granularity="axiswise"), "it must be a ScalingGranularity"),
        (lambda: Float8GemmConfig("x"), "use_fast_accum is 'x'; it must be a bool"),
        (lambda: Float8LinearConfig(emulate="yes"), "emulate is 'yes'; it must be a bool or None"),
        (lambda: Float8LinearConfig(round_scales_to_power_of_2="floor"), "it must be a bool"),
        (lambda: Float8LinearConfig(cast_config_input="rowwise"), "it must be a CastConfig"),
        (lambda: Float8LinearConfig(cast_config_weight=None), "it must be a CastConfig"),
        (lambda: Float8LinearConfig(gemm_config_output=True), "it must be a Float8GemmConfig"),
        (lambda: Gemm("a", "b"), "Gemm.a is 'a'; it must be a Cast or None"),
        (lambda: Recipe("x", "a", "b", "c"), "Recipe.output is 'a'; it must be a Gemm"),
        (lambda: RECIPES["mxfp8"].with_scales("floor"), "it must be a ScaleFormat"),
    ],
)
def test_wrong_arguments_are_errors(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def accepting_all_but(names: list[str], unwanted: str) -> Callable[[nn.Module, str], bool]:
    def accept(module: nn.Module, fqn: str) -> bool:
        names.append(fqn)
        return fqn != unwanted

    return accept


@pytest.mark.parametrize("compiled", ["whole", "part"])
def test_filters_get_names_without_what_compiling_adds(compiled: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "output": nn.Linear(16, 16)})
    whole = torch.compile(model) if compiled == "whole" else model
    if compiled == "part":
        model["output"] = torch.compile(model["output"])
    names: list[str] = []
    convert_to_float8_training(whole, module_filter_fn=accepting_all_but(names, "output"))
    assert [name.removesuffix("._orig_mod") for name in names] == names
    assert "output" in names
    inner = model["output"]
    assert not isinstance(getattr(inner, "_orig_mod", inner), Float8Linear)
    assert isinstance(model["body"], Float8Linear)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda module, fqn: None, "returned None for '0'; it must return True or False"),
        (
            lambda fqn, mod: fqn != "output",
            r"takes \(fqn, mod\); it is called with \(module, fqn\): swap them",
        ),
        (lambda name, module: True, "swap them"),
        (lambda module, fqn: 1, "returned 1 for '0'"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(wrong: Callable, message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(TypeError, match=message):
        convert_to_float8_training(model, module_filter_fn=wrong)
    assert type(model[0]) is nn.Linear


def test_an_error_of_a_filter_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ZeroDivisionError) as caught:
        convert_to_float8_training(model, module_filter_fn=lambda module, fqn: 1 / 0)
    assert caught.value.__notes__ == ["raised by module_filter_fn(module, fqn) for Linear '0'"]


def test_back_to_plain_linears() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(16, 32, bias=False), nn.Conv1d(1, 1, 1)), shared)
    calls: list[int] = []
    model[1][0].register_forward_hook(lambda *_: calls.append(1))
    parameters, attributes = dict(model.named_parameters()), [set(vars(m)) for m in model.modules()]
    convert_to_float8_training(model, config="rowwise")

    assert convert_from_float8_training(model) is model
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [nn.Linear] * 2
    assert model[0] is model[2]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [set(vars(m)) for m in model.modules()] == attributes
    x = torch.randn(3, 16)
    assert torch.equal(model[1][0](x), nn.functional.linear(x, parameters["1.0.weight"]))
    assert calls == [1]
    assert type(convert_from_float8_training(Float8Linear(16, 16))) is nn.Linear
