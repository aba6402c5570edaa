"""Fused modules compute through kernels what they compute in plain PyTorch."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from octavo.float8 import Float8LinearConfig, convert_to_float8_training
from octavo.float8.casts import gpu_cast, producer_maxima
from octavo.float8.casts.gpu_cast import use_kernels
from octavo.float8.fused import GatedLinear, NormedInput, SharedInput
from octavo.float8.kernels import ops
from tests.float8.graphs import FLOAT8, compile_and_capture, compiles, saved_bytes

DIM, HIDDEN = 64, 128
pytestmark = compiles


@pytest.fixture(autouse=True)
def _kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cast, "_device_supported", lambda device: True)
    torch._dynamo.reset()


class Block(nn.Module):
    """A block without attention: what is between the products is elementwise."""

    def __init__(self, recipe: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.RMSNorm(DIM, eps=1e-5), nn.RMSNorm(DIM, eps=1e-5)
        widths = {"wq": (DIM, DIM), "wk": (DIM, DIM), "wo": (DIM, DIM)}
        widths |= {"w1": (DIM, HIDDEN), "w3": (DIM, HIDDEN), "w2": (HIDDEN, DIM)}
        for name, (wide, narrow) in widths.items():
            setattr(self, name, nn.Linear(wide, narrow, bias=False))
        if recipe is not None:
            config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
            convert_to_float8_training(self, config=config)
        self.enter = NormedInput(self.norm1, (self.wq, self.wk))
        self.leave = SharedInput([self.wo])
        self.gates = NormedInput(self.norm2, (self.w1, self.w3))
        self.down = GatedLinear(self.w2)

    def forward(self, x: Tensor) -> Tensor:
        h, (q, k) = self.enter(x)
        (out,) = self.leave(q.value * k.value, note_maxima=True)
        h, (gate, up) = self.gates(out, h, note_maxima=True)
        return h + self.down(gate, up).value


def gradients(run: nn.Module, block: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    block.zero_grad()
    x = torch.randn(2, 20, DIM, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = run(x * 1)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    return max(
        float((one.double() - other.double()).norm() / other.double().norm())
        for one, other in zip(got, want, strict=True)
    )


# One ulp in a norm moves a value across a float8 rounding boundary: an eighth of it, in few values.
@pytest.mark.parametrize(
    ("recipe", "limit"), [(None, 1e-6), ("rowwise", 1e-2), ("tensorwise", 1e-2), ("blockwise", 1e-2)]
)
def test_a_block(recipe: str | None, limit: float) -> None:
    block = Block(recipe)
    with use_kernels(False):
        want = gradients(block, block)
    assert apart(gradients(block, block), want) < limit


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_maxima_arrive_where_tensors_are_cast(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    cast = producer_maxima.quantize_with_maxima

    def spy(x, row, col, maxima):
        seen.append(tuple(x.shape))
        for largest, dim in zip(maxima, (1, 0), strict=True):
            assert torch.equal(largest.amax(dim=0).view(torch.float32), x.float().abs().amax(dim=dim))
        return cast(x, row, col, maxima)

    monkeypatch.setattr("octavo.float8.casts.operands.quantize_with_maxima", spy)
    block = Block(recipe).to(torch.bfloat16)
    gradients(block, block, torch.bfloat16)
    # Forward: the inputs of wq|wk, w1|w3 and w2. Backward: the gradients of w3, w1 and wo.
    assert seen == [(40, DIM), (40, DIM), (40, HIDDEN), (40, HIDDEN), (40, HIDDEN), (40, DIM)]


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_maxima_change_no_bit(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(recipe).to(torch.bfloat16)
    got = gradients(block, block, torch.bfloat16)
    monkeypatch.setattr(producer_maxima, "_quantize_by_kernel", lambda *args: None)
    for one, other in zip(got, gradients(block, block, torch.bfloat16), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "blockwise", "rowwise_with_gw_hp"])
def test_making_an_input_again_changes_no_bit(recipe: str) -> None:
    block = Block(recipe).to(torch.bfloat16)
    want = gradients(block, block, torch.bfloat16)
    block.down = GatedLinear(block.w2, recompute=True)
    for one, other in zip(gradients(block, block, torch.bfloat16), want, strict=True):
        assert torch.equal(one, other)


def test_compiled_in_one_graph_that_keeps_float8() -> None:
    """Of the inputs of wq|wk, wo and w1|w3; maxima travel through the compiled backward."""
    block = Block("rowwise")
    graphs = compile_and_capture(block, torch.randn(40, DIM, requires_grad=True))
    assert len(graphs.forward) == len(graphs.backward) == 1
    kept = [t.numel() for t in graphs.saved() if t.dtype in FLOAT8 and t.shape[1] == 40]
    assert kept.count(40 * DIM) >= 3
    casts = [node for node in graphs.backward[0].graph.nodes if "cast_with_maxima" in str(node.target)]
    assert len(casts) >= 3  # of the gradients of w3, w1 and wo


class Plain(nn.Module):
    """The products of `Block`, called one by one."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        h = x + b.wo(b.wq(x) * b.wk(x))
        return h + b.w2(F.silu(b.w1(h)) * b.w3(h))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_compiled_linears_of_one_input_share_its_cast(recipe: str) -> None:
    graphs = compile_and_capture(Plain(Block(recipe)), torch.randn(40, DIM, requires_grad=True))

    def cast(graph: fx.GraphModule) -> list[tuple[int, int]]:
        calls = [node for node in graph.graph.nodes if "cast_by_" in str(node.target)]
        return sorted(
            tuple(node.args[0].meta["val"].shape) for node in calls if 40 in node.args[0].meta["val"].shape
        )

    # x, the input of wo, h and the input of w2; then their products' gradients.
    assert cast(graphs.forward[0]) == [(40, DIM)] * 3 + [(40, HIDDEN)]
    assert cast(graphs.backward[0]) == [(40, DIM)] * 4 + [(40, HIDDEN)] * 2


def test_less_is_kept_than_in_plain_pytorch() -> None:
    block = Block("rowwise").to(torch.bfloat16)
    x = torch.randn(2, 20, DIM).to(torch.bfloat16).requires_grad_()
    kept = saved_bytes(lambda x: block(x * 1), x, block)
    with use_kernels(False):
        assert kept < saved_bytes(lambda x: block(x * 1), x, copy.deepcopy(block))


def test_gates_may_be_parts_of_one_tensor() -> None:
    both = torch.randn(37, 260)
    a, b, dh = both[:, :130], both[:, 130:], torch.randn(37, 130)
    for one, other in zip(
        (*ops.silu_mul_with_maxima(a, b), *ops.silu_mul_backward_with_maxima(dh, a, b)),
        (
            *ops.silu_mul_with_maxima(a.contiguous(), b.contiguous()),
            *ops.silu_mul_backward_with_maxima(dh, a.contiguous(), b.contiguous()),
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_without_an_eps_means_what_pytorchs_does(dtype: torch.dtype) -> None:
    """Inputs so small that eps decides."""
    norm, linear = nn.RMSNorm(DIM, dtype=dtype), nn.Linear(DIM, 16, bias=False, dtype=dtype)
    x = (0.01 * torch.randn(20, DIM, generator=torch.Generator().manual_seed(1))).to(dtype)
    (product,) = NormedInput(norm, (linear,))(x)[1]
    want = linear(norm(x))
    assert apart([product.value.detach()], [want.detach()]) < 2 * torch.finfo(dtype).eps


def test_a_norm_of_another_width_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="normalized_shape"):
        NormedInput(nn.RMSNorm(32), (nn.Linear(DIM, 16),))(torch.randn(2, 4, DIM))


def test_a_gate_and_an_up_of_different_shapes_or_strides() -> None:
    linear = nn.Linear(DIM, 16)
    both = torch.randn(4, 2 * DIM, generator=torch.Generator().manual_seed(1))
    gate, up = both.split(DIM, dim=1)
    for a, b in ((gate.contiguous(), up), (gate, up.contiguous()), (gate, up[:1])):
        got = GatedLinear(linear)(a, b).value
        want = linear(nn.functional.silu(a) * b)
        assert apart([got.detach()], [want.detach()]) < 1e-6
    with pytest.raises(RuntimeError, match="size"):
        GatedLinear(linear)(gate[:2], up[:3])
