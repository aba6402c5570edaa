"""Checkpointing changes what is kept, never what is computed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.config.schema import ActivationCheckpoint
from octavo.distributed.activation_checkpoint import checkpoint_layer
from octavo.families import ModelArgs
from octavo.models.init import init_weights
from octavo.models.transformer import Transformer

ARGS = ModelArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64, max_seq_len=16)
MODES = {
    "none": ActivationCheckpoint(mode="none"),
    "op": ActivationCheckpoint(mode="selective", selective_ac_option="op"),
    "every 2nd": ActivationCheckpoint(mode="selective", selective_ac_option="2"),
    "full": ActivationCheckpoint(mode="full"),
}


class CountMatmuls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.mm = 0
        self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.mm += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.attention += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def run(settings):
    """Loss, gradients, and the matrix products and attentions that backward ran."""
    model = Transformer(ARGS)
    init_weights(model, seed=0)
    for number, layer in list(model.layers.items()):
        model.layers[number] = checkpoint_layer(layer, settings, int(number))
    tokens = torch.arange(32).view(2, 16)
    with CountMatmuls() as forward:
        loss = model(tokens).square().mean()
    with CountMatmuls() as backward:
        loss.backward()
    assert forward.mm == 3 * 7 + 1
    return loss.item(), [p.grad for p in model.parameters()], backward


@pytest.fixture(scope="module")
def plain():
    return run(MODES["none"])


@pytest.mark.parametrize("mode", MODES)
def test_same_loss_and_gradients(mode, plain):
    loss, gradients, _ = run(MODES[mode])
    assert loss == plain[0]
    for got, expected in zip(gradients, plain[1], strict=True):
        assert torch.equal(got, expected)


# each layer has 7 products; backward itself needs two for every one of forward
@pytest.mark.parametrize(
    ("mode", "matmuls", "attentions"),
    [("none", 0, 0), ("op", 3 * 3, 0), ("every 2nd", 2 * 7, 2), ("full", 3 * 7, 3)],
)
def test_what_backward_computes_again(mode, matmuls, attentions, plain):
    _, _, backward = run(MODES[mode])
    again = backward.mm - plain[2].mm
    # the last product of a recomputed layer is not needed by backward, so torch stops before it
    recomputed_layers = {"none": 0, "op": 0, "every 2nd": 2, "full": 3}[mode]
    assert again == matmuls - recomputed_layers
    assert backward.attention == attentions


def test_state_dict_keeps_its_names():
    model = Transformer(ARGS)
    names = list(model.state_dict())
    model.layers["0"] = checkpoint_layer(model.layers["0"], MODES["full"], 0)
    assert list(model.state_dict()) == names
