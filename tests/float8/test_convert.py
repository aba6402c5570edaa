"""Swapping linears, and choosing which."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.float8 import RECIPES, Float8Linear, auto_filter_for_recipe, convert_to_float8_training
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


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="list"):
        convert_to_float8_training([nn.Linear(16, 16)])
    with pytest.raises(TypeError, match="int"):
        convert_to_float8_training(nn.Linear(16, 16), config=3)
    with pytest.raises(ValueError, match="rowise"):
        convert_to_float8_training(nn.Sequential(nn.ReLU()), config="rowise")


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
