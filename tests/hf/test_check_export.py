"""The comparison of logits needs little memory and detects a wrong export."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.hf import check_export
from octavo.hf.model_sources import ModelSource
from octavo.hf.stored_weights import Weights, shapes_of
from octavo.tokenizer import build_tokenizer
from tests.models.small_llama import SHAPES, SPEC, noisy

TOKENIZER = build_tokenizer("octavo_bpe_2048")


def source_of(shape):
    args = replace(SHAPES[shape], vocab_size=2048)
    model = noisy(args)
    state = model.state_dict()
    weights = Weights("a model", shapes_of(model), lambda name: state[name].clone())
    return ModelSource(Path("nowhere"), SPEC, args, 48, TOKENIZER, weights), model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_layer_by_layer_equal_the_models(shape):
    source, model = source_of(shape)
    tokens = check_export.sample_tokens(source)
    assert tokens.shape == (1, 48)
    with torch.no_grad():
        assert torch.equal(
            check_export.octavo_logits(source, source.weights, tokens, torch.float32), model(tokens)
        )


def test_only_one_linear_is_in_memory(monkeypatch):
    source, _ = source_of("gqa")
    in_memory = []
    original = torch.nn.Linear.forward

    def forward(self, x):
        top = tops[-1]
        in_memory.append(sum(not m.weight.is_meta for m in top.modules() if isinstance(m, torch.nn.Linear)))
        return original(self, x)

    tops = []
    build = ModelSource.build
    monkeypatch.setattr(ModelSource, "build", lambda self, n: tops.append(build(self, n)) or tops[-1])
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    check_export.octavo_logits(source, source.weights, check_export.sample_tokens(source), torch.float32)
    assert in_memory == [1] * 15


@pytest.mark.parametrize("name", ["layers.1.attention.wk.weight", "norm.weight", "output.weight"])
def test_a_wrong_weight_is_detected(name):
    source, _ = source_of("gqa")

    def read(requested):
        tensor = source.weights.read(requested)
        return tensor.flip(0) if requested == name else tensor

    wrong = Weights("wrong", source.weights.shapes, read)
    tokens = check_export.sample_tokens(source)
    logits = [check_export.octavo_logits(source, w, tokens, torch.float32) for w in (source.weights, wrong)]
    assert not check_export.compare_logits(logits[1], logits[0]).within
    assert check_export.compare_logits(logits[0], logits[0]) == check_export.LogitsComparison(0.0, True)


def test_nan_exceeds_any_tolerance():
    assert not check_export.compare_logits(torch.tensor([torch.nan]), torch.zeros(1)).within
    assert not check_export.compare_logits(torch.full((1,), torch.nan), torch.full((1,), torch.nan)).within
