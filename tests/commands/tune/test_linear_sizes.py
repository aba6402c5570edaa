"""The sizes of a model's products, as its configuration lays it out."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from octavo import models
from octavo.commands.tune.linear_sizes import Size, groups_of
from octavo.config import ConfigError, load
from octavo.config.parallel_dims import parallel_dims_of
from tests.models.own import own_model

WK = "layers.*.attention.wk"


def sizes(*argv, processes=1):
    job = load(["--config-file", "llama3_8b.toml", *argv])
    groups, kept = groups_of(job, parallel_dims_of(job.parallelism, processes))
    return {layer.pattern: layer for group in groups for layer in group}, groups, kept


def test_llama3_8b():
    layers, groups, kept = sizes()
    assert kept == ["output"]
    assert {layer.count for layer in layers.values()} == {32}
    assert layers[WK].size == Size(8192, 4096, 1024)
    assert layers["layers.*.feed_forward.w2"].size == Size(8192, 14336, 4096)
    leaves = [[layer.pattern.rpartition(".")[2] for layer in group] for group in groups]
    assert leaves == [["wq", "wk", "wv"], ["wo"], ["w1", "w3"], ["w2"]] or sorted(leaves) == sorted(
        [["wq", "wk", "wv"], ["wo"], ["w1", "w3"], ["w2"]]
    )


def test_parallelism_cuts_them():
    tensor, *_ = sizes("--parallelism.tensor_parallel_degree=4", processes=8)
    assert tensor[WK].size == Size(8192, 4096, 256)
    assert tensor["layers.*.feed_forward.w2"].size == Size(8192, 3584, 4096)
    context, *_ = sizes(
        "--parallelism.context_parallel_degree=2", "--training.local_batch_size=3", processes=2
    )
    assert context[WK].size == Size(3 * 8192 // 2, 4096, 1024)


def test_layers_out_of_a_filter():
    layers, _, kept = sizes("--float8.filter_fqns=layers.0.,wk")
    assert WK not in layers
    assert layers["layers.*.attention.wq"].count == 31
    assert layers["output"].count == 1
    assert len(kept) == 7 + 31


def test_errors():
    with pytest.raises(ConfigError, match="leaves no linear layer"):
        sizes("--float8.filter_fqns=layers,output")
    with pytest.raises(ConfigError, match="the size of this model follows its tokenizer"):
        sizes("--model.flavor=debugmodel", "--float8.filter_fqns=layers")


def test_rows_are_those_of_the_tensor_parallel_plan():
    """What the registry says of linears is what the plan does with them."""
    spec = models.get("llama3")
    with torch.device("meta"):
        layer = spec.build(spec.configure(spec.args("debugmodel"), 64, 16)).layers["0"]
    plan = SimpleNamespace(
        columns=lambda linear, **_: "columns",
        rows=lambda linear, **_: "rows",
        gather=lambda linears, **_: ("gather", linears),
    )
    styles = importlib.import_module("octavo.models.parallelize")._layer_styles(layer, plan)
    rows = {name.rpartition(".")[2] for name, style in styles.items() if style == "rows"}
    assert rows == set(spec.linears.rows)
    shared = [set(style[1]) for style in styles.values() if isinstance(style, tuple) and style[0] == "gather"]
    named = dict(layer.named_modules())
    parents = ("attention", "feed_forward")
    told = [
        {named[f"{parent}.{leaf}"] for leaf in group}
        for parent, group in zip(parents, spec.linears.same_input, strict=True)
    ]
    assert shared == told


def test_a_model_of_the_users_own(tmp_path, monkeypatch):
    assert sizes(*own_model(tmp_path, monkeypatch))[0] == sizes()[0]
