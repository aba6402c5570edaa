"""The chunked loss and its gradients equal the plain ones, and no tensor is as large as the logits."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.float8 import Float8LinearConfig, cast_weights_once, convert_to_float8_training
from octavo.models.loss import IGNORED, ChunkedLoss, _addmm_float32, attach_loss
from octavo.models.transformer import Transformer
from tests.models.small_llama import small

T, D, V = 40, 32, 203


class Largest(TorchDispatchMode):
    """Records the most elements of any operation's result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return out


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    h = torch.randn(2, T // 2, D, dtype=dtype, requires_grad=True)
    w = (torch.randn(V, D) * D**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2, T // 2))
    labels[0, 3] = labels[1, -1] = IGNORED
    return h, w, labels


def plain(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("tokens", [1, 7, 16, T, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_loss(tokens, dtype):
    h, w, labels = inputs(dtype)
    want = plain(F.linear(h, w), labels)
    gradients = torch.autograd.grad(want / 64, (h, w))
    got = ChunkedLoss(tokens).from_weight(h, w, labels)
    assert got.dtype == torch.float32
    assert abs(got.item() / want.item() - 1) < 1e-6
    for one, other in zip(torch.autograd.grad(got / 64, (h, w)), gradients, strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_full_logits_never_exist():
    h, w, labels = inputs()
    with Largest() as largest:
        ChunkedLoss(8).from_weight(h, w, labels).backward()
    assert largest.elements == max(V * D, 8 * V)
    with Largest() as largest:
        plain(F.linear(h, w), labels).backward()
    assert largest.elements == T * V


def test_without_gradients_none_is_computed():
    h, w, labels = inputs()
    with torch.no_grad(), Largest() as largest:
        got = ChunkedLoss(8).from_weight(h, w, labels)
    assert largest.elements == 8 * V
    assert got.item() == pytest.approx(plain(F.linear(h, w), labels).item(), rel=1e-6)


def test_frozen_inputs_get_no_gradient():
    h, w, labels = inputs()
    ChunkedLoss(8).from_weight(h, w.detach(), labels).backward()
    assert h.grad is not None
    ChunkedLoss(8).from_weight(h.detach(), w, labels).backward()
    assert w.grad is not None


def test_a_second_backward_is_refused():
    h, w, labels = inputs()
    loss = ChunkedLoss(8).from_weight(h, w, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "tensorwise"])
def test_a_float8_head(recipe):
    """With one scale per token and channel, output and grad_input equal the unchunked ones. grad_weight's
    scales are per chunk, and so are all of tensorwise's.
    """
    h, w, labels = inputs()
    head = nn.Linear(D, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(w)
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    head = convert_to_float8_training(head, config=config)
    want = plain(head(h), labels)
    dh, dw = torch.autograd.grad(want, (h, head.weight))
    attach_loss(head, ChunkedLoss(8, casts_once=cast_weights_once))
    assert list(head.state_dict()) == ["weight"]
    got = head(h, labels)
    got.backward()
    per_token = recipe != "tensorwise"
    assert abs(got.item() / want.item() - 1) < (1e-6 if per_token else 1e-2)
    assert distance(h.grad, dh) < (1e-6 if per_token else 0.1)
    assert distance(head.weight.grad, dw) < 0.1
    assert head.weight_cache.casts is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_model(tied):
    torch.manual_seed(0)
    model = Transformer(small(tie_embeddings=tied))
    tokens = torch.randint(0, 131, (2, 24))
    want = plain(model(tokens), tokens)
    want.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.chunk_loss(ChunkedLoss(10))
    got = model(tokens, labels_BS=tokens)
    got.backward()
    assert math.isclose(got.item(), want.item(), rel_tol=1e-6)
    for name, p in model.named_parameters():
        assert distance(p.grad, gradients[name]) < 2e-6, name
    assert model(tokens).shape == (2, 24, 131)  # without labels as before


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="without a bias"):
        attach_loss(nn.Linear(4, 4), ChunkedLoss(8))


def test_autocast_applies():
    h, w, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        want = plain(F.linear(h, w), labels)
        got = ChunkedLoss(7).from_weight(h, w, labels)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h, w)), strict=True):
        assert one.dtype == torch.float32
        assert distance(one, other) < 1e-2


def test_a_chunk_needs_a_token():
    for tokens in (0, -3):
        with pytest.raises(ValueError, match=f"tokens is {tokens}"):
            ChunkedLoss(tokens)


def test_on_a_gpu_a_product_is_added_to_the_sum_in_one_call(monkeypatch):
    """Written beside it and then added, it would move twice the bytes."""
    calls = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: calls.append((args, kwargs)))
    with FakeTensorMode():
        total = torch.empty(48, 32, device="cuda")
        a, b = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((48, 64), (64, 32)))
        _addmm_float32(total, a, b)

    ((args, kwargs),) = calls
    assert args[0] is kwargs["out"] is total
    assert kwargs["out_dtype"] == torch.float32
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema)
