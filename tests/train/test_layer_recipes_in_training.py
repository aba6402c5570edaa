"""A recipe a layer in the trainer: which layer gets which, that it trains so, and what is refused."""

import logging

import pytest
import torch
from torch import nn

from octavo.config import ConfigError
from octavo.config.schema import Float8
from octavo.float8 import Float8Linear
from octavo.train import quantization
from tests.helpers import launching

ATTENTION, FEED_FORWARD = "layers.*.attention.*", "layers.*.feed_forward.w?"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))


def convert(*recipes, model=None, **settings):
    model = model or Small()
    quantization.convert(
        model,
        "rowwise",
        Float8(layer_recipes=list(recipes), emulate=True, **settings),
        torch.device("cpu"),
        filters_given_on_cli=True,
    )
    return {
        name: module.recipe.name if isinstance(module, Float8Linear) else None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_each_layer_takes_its_own():
    assert convert("a=tensorwise", "b=high_precision") == {"a": "tensorwise", "b": None, "c": "rowwise"}
    assert convert("*=blockwise", "[ab]=tensorwise") == {
        "a": "tensorwise",
        "b": "tensorwise",
        "c": "blockwise",
    }
    assert convert("*=blockwise", filter_fqns=["b"]) == {"a": "blockwise", "b": None, "c": "blockwise"}


@pytest.mark.parametrize(
    ("recipes", "settings", "message"),
    [
        (["d=rowwise"], {}, "'d=rowwise' matches none of the model's linear layers, like a, b, c"),
        (["a=rowwise", "*=tensorwise"], {}, "'a=rowwise' decides about no layer: .* or a later pattern"),
        (["a=tensorwise"], {"filter_fqns": ["a"]}, "'a=tensorwise' decides about no layer"),
        (["*=high_precision"], {}, "float8.layer_recipes = .* leaves none of the 3 linear layers"),
    ],
)
def test_patterns_that_do_nothing(recipes, settings, message):
    with pytest.raises(ConfigError, match=message):
        convert(*recipes, **settings)


def test_only_layers_that_can_are_gathered_in_float8(caplog):
    model = Small()
    with caplog.at_level(logging.INFO):
        convert("a=tensorwise", "b=high_precision", model=model, enable_fsdp_float8_all_gather=True)
    assert [model.a.gathers_float8, model.c.gathers_float8] == [True, False]
    assert "FSDP gathers the weights of the 1 tensorwise layer in float8" in caplog.text
    assert (
        "FSDP gathers the weights of the 1 rowwise layer in high precision: rowwise has no single"
        in caplog.text
    )


def test_training(tmp_path):
    """The layers named compute in their recipe: losses differ from one recipe's, and agree with spelling each
    layer out.
    """
    short = {"training.steps": 2, **launching.shallow(2)}
    mixed = launching.recipe("rowwise") | short | {"float8.layer_recipes": f"{ATTENTION}=tensorwise"}
    run = launching.train(tmp_path / "mixed", mixed)
    assert "Float8 training active with recipe rowwise in 6 layers" in run.log
    assert "Float8 training active with recipe tensorwise in 8 layers" in run.log
    assert "Swapped to Float8Linear layers: 14 of 15 linear layers; in high precision: output" in run.log
    spelt = f"{ATTENTION}=tensorwise,{FEED_FORWARD}=rowwise"
    other = launching.train(
        tmp_path / "spelt", launching.recipe("blockwise") | short | {"float8.layer_recipes": spelt}
    )
    assert other.losses == run.losses
    assert launching.train(tmp_path / "one", launching.recipe("rowwise") | short).losses != run.losses


MIXED = "*.wq=tensorwise,*.wk=high_precision,*.w1=rowwise,*.w3=blockwise"


@pytest.mark.parametrize(
    "flags",
    [
        {"parallelism.tensor_parallel_degree": 2},
        {"float8.enable_fsdp_float8_all_gather": "true"},
    ],
    ids=["tensor parallel", "FSDP, float8 gather"],
)
def test_linears_with_one_input_in_several_recipes_share_it_over_ranks(flags, tmp_path):
    """Two ranks compute what one does, although linears that read one tensor need it in different casts."""
    job = launching.recipe("tensorwise") | {"float8.layer_recipes": MIXED, "training.steps": 2}
    job["training.global_batch_size"] = 4
    alone = launching.train(tmp_path / "alone", job)
    both = launching.train(tmp_path / "both", job | flags | {"training.local_batch_size": 2}, world=2)
    assert "recipe blockwise in 6 layers, emulated: no cpu backend" in alone.log
    assert "EmulationWarning" not in alone.log  # the line above reports it
    assert both.losses == pytest.approx(alone.losses, rel=2e-3)
    assert both.losses[0] == pytest.approx(alone.losses[0], rel=1e-4)
