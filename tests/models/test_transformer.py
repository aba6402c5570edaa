"""The transformer that all families share, compared with itself."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo import models
from octavo.config import ConfigError
from octavo.families import ModelArgs
from octavo.models.attention import CoreAttention
from octavo.models.family_spec import configure
from octavo.models.init import init_weights
from octavo.models.rope import apply_rope, rope_table
from octavo.models.transformer import Transformer
from tests.models.small_llama import FLAVORS, SCALING, small


@pytest.mark.parametrize(
    ("flavor", "factor"),
    [("1B", 32), ("3B", 32), ("8B", 8), ("70B", 8), ("405B", 8), ("8B-3.0", None), ("70B-3.0", None)],
)
def test_rope_scaling_of_each_release(flavor, factor):
    scaling = FLAVORS[flavor].rope_scaling
    assert (scaling and scaling.factor) == factor


def test_names_stay_when_layers_are_removed():
    model = Transformer(small(n_layers=4))
    names = set(model.state_dict())
    del model.layers["1"]
    assert set(model.state_dict()) == {name for name in names if not name.startswith("layers.1.")}
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 131)


def test_attention_is_causal():
    model = Transformer(small())
    tokens = torch.randint(131, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 131
    with torch.no_grad():
        first, second = model(tokens), model(changed)
    torch.testing.assert_close(first[:, :10], second[:, :10])
    assert not torch.allclose(first[:, 10:], second[:, 10:])


def test_meta_construction_and_init_give_what_direct_construction_gives():
    args = small(tie_embeddings=True, rope_scaling=SCALING)
    direct = Transformer(args)
    init_weights(direct, seed=1)
    with torch.device("meta"):
        model = Transformer(args)
    assert model.rope.is_meta
    model.to_empty(device="cpu")
    init_weights(model, seed=1)
    for (name, a), (_, b) in zip(direct.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(direct.rope, model.rope)


def test_longer_sequence_than_the_table_is_refused():
    with pytest.raises(ValueError, match="49 tokens.*48 positions"):
        Transformer(small())(torch.zeros(1, 49, dtype=torch.int64))


def test_tokenizer_larger_than_the_model_is_refused():
    assert configure(FLAVORS["debugmodel"], 2048, 256).vocab_size == 2048
    assert configure(FLAVORS["8B"], 2048, 256).vocab_size == 128_256
    with pytest.raises(ConfigError, match=r"128,257 tokens.*128,256 embeddings"):
        configure(FLAVORS["8B"], 128_257, 256)


def test_flops_per_token_by_hand():
    spec = models.get("llama3")
    for tied in (False, True):
        args = small(tie_embeddings=tied)
        attention = 64 * 64 + 2 * 64 * 16 + 64 * 64
        layer = attention + 3 * 64 * 96 + 2 * 64
        parameters = 2 * layer + 64 + 131 * 64  # tied or not, one vocabulary matrix is multiplied
        assert spec.flops_per_token(args, Transformer(args), 32) == 6 * parameters + 12 * 2 * 64 * 32


def test_an_unknown_model_or_flavor_lists_the_known_ones():
    with pytest.raises(ConfigError, match="llama9.*known: llama3"):
        models.get("llama9")
    with pytest.raises(ConfigError, match="9B.*8B"):
        models.get("llama3").args("9B")
    with pytest.raises(ValueError, match="llama3"):
        models.register(models.get("llama3"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_eager_rope_agree(dtype, monkeypatch):
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, hidden_dim=64, vocab_size=8, max_seq_len=9)
    x, table = torch.randn(2, 9, 4, args.head_width, dtype=dtype, requires_grad=True), rope_table(args)

    def rotated():
        y = apply_rope(x, table)
        return y, *torch.autograd.grad(y.square().sum(), x)

    eager = rotated()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for expected, got in zip(eager, rotated(), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_float32_attention_on_a_gpu_has_no_groups(dtype, heads, monkeypatch):
    """No fused kernel takes groups in float32: scores of the whole sequence would be kept for backward."""
    seen = []

    def attend(q, k, v, **_):
        seen.append((k.shape[1], v.shape[1]))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, n, 8, 16, dtype=dtype, device="cuda") for n in (4, 2, 2))
        CoreAttention()(q, k, v)
    assert seen == [(heads, heads)]
