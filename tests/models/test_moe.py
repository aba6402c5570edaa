"""A mixture of experts against one expert after the other; what is counted, and what is recomputed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.config.schema import ActivationCheckpoint
from octavo.distributed.activation_checkpoint import checkpoint_layer
from octavo.families.model_args import MoEArgs
from octavo.models import grouped_mm
from octavo.models.init import init_weights
from octavo.models.moe import MixtureOfExperts, Router, balance_loss, routers
from octavo.models.transformer import Transformer
from octavo.train.balance_experts import move_bias
from tests.models.small_llama import small

ARGS = MoEArgs(8, 2, 24)
RULES = {
    "softmax": ARGS,
    "softmax, not renormalised": replace(ARGS, renormalise=False, scale=1.5),
    "sigmoid, bias": replace(ARGS, score="sigmoid", bias=True, scale=2.5),
    "groups": replace(ARGS, score="sigmoid", bias=True, groups=4, groups_kept=2),
    "shared": replace(ARGS, n_shared=2),
}


def mixture(args: MoEArgs, dim: int = 16) -> MixtureOfExperts:
    torch.manual_seed(0)
    moe = MixtureOfExperts(dim, args)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn_like(parameter))
        if moe.router.bias is not None:
            moe.router.bias.copy_(torch.randn(args.n_experts) * 0.3)
    return moe


def one_by_one(moe: MixtureOfExperts, x_BSD: torch.Tensor) -> torch.Tensor:
    """The rule of `MoEArgs`, written for one token at a time."""
    args, total = moe.router.args, []
    for x in x_BSD.flatten(0, 1):
        logits = moe.router.weight @ x
        scores = logits.softmax(-1) if args.score == "softmax" else logits.sigmoid()
        order = scores.detach() + (0 if moe.router.bias is None else moe.router.bias)
        size = args.n_experts // args.groups
        groups = sorted(range(args.groups), key=lambda g: -float(order[g * size :][:size].topk(2)[0].sum()))
        allowed = [g * size + i for g in groups[: args.groups_kept] for i in range(size)]
        chosen = sorted(allowed, key=lambda e: -float(order[e]))[: args.top_k]
        norm = sum(scores[e] for e in chosen) if args.renormalise else 1.0
        e1, e2, e3 = moe.experts.w1, moe.experts.w2, moe.experts.w3
        y = sum(scores[e] / norm * args.scale * (e2[e] @ (F.silu(e1[e] @ x) * (e3[e] @ x))) for e in chosen)
        total.append(y if moe.shared is None else y + moe.shared(x))
    return torch.stack(total).view_as(x_BSD)


@pytest.mark.parametrize("rule", RULES)
def test_outputs_and_gradients_equal_one_expert_after_the_other(rule):
    moe = mixture(RULES[rule])
    x = torch.randn(2, 7, 16, requires_grad=True)
    inputs = [x, *moe.parameters()]
    results = []
    for compute in (moe, lambda x: one_by_one(moe, x)):
        y = compute(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    assert moe.router.load.sum() == 14 * 2


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 1], [0, 0, 0, 0]], ids=str)
def test_grouped_products_and_gradients(sizes):
    ends = torch.tensor(sizes).cumsum(0).int()
    x = torch.randn(sum(sizes), 6, requires_grad=True)
    w = torch.randn(4, 5, 6, requires_grad=True)
    got = grouped_mm.grouped_mm(x, w, ends)
    expected = torch.cat([part @ w[e].t() for e, part in enumerate(x.split(sizes))])
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (x, w), dy), torch.autograd.grad(expected, (x, w), dy), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_reference_equals_torchs_grouped_product():
    ends = torch.tensor([16, 16, 48, 64], dtype=torch.int32)
    x, w = torch.randn(64, 32).bfloat16(), torch.randn(4, 16, 32).bfloat16()
    expected = torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
    torch.testing.assert_close(grouped_mm.loop(x, w, ends), expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(grouped_mm.loop_weight(dy, x, ends), torch._grouped_mm(dy.t(), x, offs=ends))


def model(mode: str, *, compiled: bool) -> Transformer:
    args = small(n_layers=1, moe=replace(ARGS, score="sigmoid", bias=True, balance_loss=1.0))
    made = Transformer(args)
    init_weights(made, seed=1)
    routers(made)["layers.0"].loss_per_token = 1e-3
    made.layers["0"] = checkpoint_layer(made.layers["0"], ActivationCheckpoint(mode=mode), 0)
    if compiled:
        made.layers["0"].compile(fullgraph=True, backend="aot_eager")
    return made


def gradients(made: Transformer) -> list[torch.Tensor]:
    tokens = torch.randint(131, (2, 48), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # microbatches
        made(tokens).square().mean().backward()
    return [parameter.grad for parameter in made.parameters()]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised in dynamo
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_each_choice_is_counted_once_whatever_is_recomputed(mode, compiled):
    plain, made = model("none", compiled=False), model(mode, compiled=compiled)
    for expected, got in zip(gradients(plain), gradients(made), strict=True):
        if compiled:  # rotates in real arithmetic
            torch.testing.assert_close(got, expected)
        else:
            assert torch.equal(got, expected)
    (expected,), (got,) = routers(plain).values(), routers(made).values()
    assert got.load.sum() == 2 * 2 * 48 * 2
    assert torch.equal(got.load, expected.load)


class Choices(TorchDispatchMode):
    """Counts the calls of topk."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.topk.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_does_not_route_anew(mode):
    made = model(mode, compiled=False)
    loss = made(torch.randint(131, (2, 48))).square().mean()
    with Choices() as choices:
        loss.backward()
    assert choices.count == 0


def test_the_bias_moves_towards_balance_and_its_mean_stays_zero():
    router = Router(8, replace(ARGS, bias=True, bias_rate=0.1))
    move_bias(router, torch.tensor([9.0, 1, 1, 1, 5, 1, 1, 1]))
    assert router.bias is not None
    step = torch.tensor([-0.1, 0.1, 0.1, 0.1, -0.1, 0.1, 0.1, 0.1])
    torch.testing.assert_close(router.bias, step - step.mean())


def test_the_balance_loss_is_one_a_token_in_balance_and_more_otherwise():
    scores = torch.full((2, 8, 8), 0.5)
    even = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8], dim=-1).expand(2, 8, 2)
    torch.testing.assert_close(balance_loss(scores, even), torch.tensor(16.0))
    one_sided = torch.tensor([0, 1]).expand(2, 8, 2)
    scores = torch.full((2, 8, 8), 0.1).index_fill(-1, torch.tensor([0, 1]), 0.7)
    torch.testing.assert_close(balance_loss(scores, one_sided), torch.tensor(16 * 4 * 0.7))


def test_the_gradient_of_the_balance_loss_is_added():
    moe = mixture(replace(ARGS, balance_loss=1.0))
    moe.router.loss_per_token = 0.25
    x = torch.randn(3, 6, 16)
    moe(x).sum().backward()
    got = moe.router.weight.grad
    plain = mixture(ARGS)
    scores = F.linear(x, plain.router.weight).softmax(-1)
    (plain(x).sum() + 0.25 * balance_loss(scores, scores.topk(2).indices)).backward()
    torch.testing.assert_close(got, plain.router.weight.grad)
