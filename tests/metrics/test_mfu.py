"""The three figures against cases counted by hand; what checkpointing computes again against what it does."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo import models
from octavo.config.schema import ActivationCheckpoint, Float8
from octavo.distributed.activation_checkpoint import checkpoint_layer
from octavo.families import ModelArgs
from octavo.float8.matmul import PRODUCTS
from octavo.metrics.device import Peak
from octavo.metrics.mfu import Work, utilization, work_of
from octavo.models.transformer import Transformer
from octavo.train import quantization

# One layer, counted by hand. Multiply-adds a token: wq, wo 64 each, wk, wv 32 each, w1, w2, w3 128 each,
# output 80; attention 2 x 8 x 16 in forward (scores and values, the whole square). Weights of norms: 24.
ARGS = ModelArgs(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16, vocab_size=10, max_seq_len=16)
SEQ_LEN = 16
LAYER = 2 * (64 + 64 + 32 + 32 + 3 * 128)  # 1152 FLOPs in forward
HEAD, ATTENTION, NORMS = 2 * 80, 4 * 8 * 16, 6 * 24
TOTAL = 3 * (LAYER + HEAD + ATTENTION) + NORMS

H100 = Peak(1000.0, "round figures", {"bfloat16": 1000.0, "float8": 2000.0})


def work(precisions, *, mode="none", option="op", high="bfloat16", to_the_end=False, args=ARGS):
    model = Transformer(args)
    spec = models.get("llama3")
    flops = spec.flops_per_token(args, model, SEQ_LEN)
    layer = spec.layer_products(args, SEQ_LEN)
    settings = ActivationCheckpoint(mode=mode, selective_ac_option=option)
    return work_of(model, flops, precisions, high, settings, layer, to_the_end=to_the_end)


def linears(*precisions, but=()):
    names = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    names += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    return {f"layers.0.{name}": precisions for name in names} | {"output": ("bfloat16",) * 3}


BF16, FP8 = linears(*["bfloat16"] * 3), linears(*["float8"] * 3)


def test_bfloat16_is_the_same_by_either_count():
    found = work(BF16)
    assert found.model == {"bfloat16": TOTAL}
    used = utilization(found, 0.1, H100)
    assert used.mfu == used.mfu_mixed == used.hfu == pytest.approx(100 * 0.1 * TOTAL / 1000)


def test_everything_in_float8_takes_half_the_share():
    used = utilization(Work({"float8": 500.0}, {}), 1.0, H100)
    assert (used.mfu, used.mfu_mixed, used.hfu) == (50.0, 25.0, 25.0)


def test_head_and_attention_stay_in_bfloat16():
    used = utilization(work(FP8), 0.1, H100)
    assert used.mfu == pytest.approx(10 * TOTAL / 1000)
    high = 3 * HEAD + 3 * ATTENTION + NORMS
    assert used.mfu_mixed == pytest.approx(10 * (3 * LAYER / 2000 + high / 1000))
    assert used.hfu == used.mfu_mixed


def test_weight_gradients_in_high_precision():
    found = work(linears("float8", "float8", "bfloat16"))
    assert found.model["float8"] == 2 * LAYER
    assert found.total == TOTAL


@pytest.mark.parametrize(
    ("mode", "option", "again"),
    [
        # whole layers, up to the last product, whose result backward does not need; attention too
        ("full", "op", {"float8": LAYER - 256, "bfloat16": ATTENTION}),
        ("selective", "1", {"float8": LAYER - 256, "bfloat16": ATTENTION}),
        # every second product in its order (wk, wo, w3), attention kept
        ("selective", "op", {"float8": 64 + 128 + 256}),
    ],
)
def test_checkpointing_is_in_hfu_and_nowhere_else(mode, option, again):
    found = work(FP8, mode=mode, option=option)
    assert {key: value for key, value in found.again.items() if value} == again
    used, plain = utilization(found, 0.1, H100), utilization(work(FP8), 0.1, H100)
    assert (used.mfu, used.mfu_mixed) == (plain.mfu, plain.mfu_mixed)
    seconds = again.get("float8", 0) / 2000 + again.get("bfloat16", 0) / 1000
    assert used.hfu == pytest.approx(plain.hfu + 10 * seconds)


def test_every_second_layer():
    two = replace(ARGS, n_layers=2)
    assert work({}, mode="selective", option="2", args=two).again == work({}, mode="full").again


@pytest.mark.parametrize(
    ("found", "peak"),
    [
        (Work({"bfloat16": 1.0, "float8": 1.0}, {}), Peak(1e3, "no float8 units", {"bfloat16": 1e3})),
        (Work({"float32": 1.0}, {}), H100),
        (Work({"bfloat16": 1.0}, {}), Peak(None, "unknown")),
    ],
)
def test_what_is_not_known_is_not_guessed(found, peak):
    used = utilization(found, 1.0, peak)
    assert used.mfu_mixed is used.hfu is None
    assert (used.mfu is None) == (peak.flops is None)


def test_recomputation_of_a_model_that_does_not_tell_is_not_known():
    model = torch.nn.Linear(4, 4)
    settings = ActivationCheckpoint(mode="full")
    found = work_of(model, 96.0, {}, "bfloat16", settings, None, to_the_end=False)
    used = utilization(found, 1.0, H100)
    assert used.hfu is None
    assert used.mfu_mixed == pytest.approx(9.6)


def test_a_model_that_computes_less_than_its_layers_is_believed():
    found = work_of(torch.nn.Linear(4, 4), 48.0, {"": ("float8",) * 3}, "bfloat16", ActivationCheckpoint(),
                    None, to_the_end=False)  # fmt: skip
    assert found.model == {"bfloat16": 0.0, "float8": 48.0}


def test_emulated_float8_counts_as_what_it_ran_in():
    model = Transformer(ARGS)
    quantization.convert(model, "rowwise_with_gw_hp", Float8(filter_fqns=["output"]), torch.device("cpu"),
                         filters_given_on_cli=False)  # fmt: skip
    found = quantization.product_precisions(model, torch.device("cpu"), "bfloat16")
    assert found["layers.0.attention.wq"] == ("float32", "float32", "bfloat16")
    assert found["output"] == ("bfloat16",) * 3


class CountProducts(TorchDispatchMode):
    """Counts the FLOPs of two-dimensional products."""

    def __init__(self):
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            (rows, inner), columns = args[0].shape, args[1].shape[1]
            self.flops += 2.0 * rows * inner * columns
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("float8", [False, True])
def test_the_count_of_what_is_computed_again_is_what_is_computed_again(mode, float8):
    torch.manual_seed(0)
    model = Transformer(ARGS)
    if float8:
        quantization.convert(model, "rowwise", Float8(filter_fqns=["output"]), torch.device("cpu"),
                             filters_given_on_cli=False)  # fmt: skip
    settings = ActivationCheckpoint(mode=mode)
    model.layers["0"] = checkpoint_layer(model.layers["0"], settings, 0)
    batch = torch.randint(0, 10, (1, SEQ_LEN))
    with CountProducts() as count:
        model(batch).square().sum().backward()
    attention = 3 * ATTENTION  # no mm
    computed = (
        TOTAL
        - NORMS
        - attention
        + sum(work(BF16, mode=mode, to_the_end=float8).again.values())
        - (ATTENTION if mode == "full" else 0)
    )
    assert count.flops == SEQ_LEN * computed
