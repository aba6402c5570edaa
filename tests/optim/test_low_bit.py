"""AdamW with small moments: the same steps up to rounding, fair rounding, states that load bit for bit."""

import importlib.util

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo.optim import low_bit, one_kernel
from octavo.optim.low_bit import AdamW, AdamW8bit, store

NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'octavo[adam8bit]'",
)


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((96, 64), (10,))]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.fixture(params=["operations", "one kernel"])
def way(request, monkeypatch):
    """As a CPU steps, and as a GPU does, uncompiled."""
    if request.param == "one kernel":
        monkeypatch.setattr(low_bit, "_in_one_kernel", lambda w: True)
        monkeypatch.setattr(one_kernel, "compiled_update", lambda: one_kernel.update)


def test_in_float32_it_is_pytorchs(way):
    mine, theirs = parameters(), parameters()
    train(AdamW(mine, state_dtype=torch.float32, **NUMBERS), mine, 5)
    train(torch.optim.AdamW(theirs, **NUMBERS), theirs, 5)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_pieces_change_nothing(way, monkeypatch):
    whole, cut = parameters(), parameters()
    train(AdamW(whole, state_dtype=torch.float32, **NUMBERS), whole, 3)
    monkeypatch.setattr(low_bit, "PIECE", 1000)
    train(AdamW(cut, state_dtype=torch.float32, **NUMBERS), cut, 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_bfloat16_step_nearly_alike(dtype, way):
    mine, theirs = parameters(dtype), [nn.Parameter(p.float()) for p in parameters(dtype)]
    optimizer = AdamW(mine, state_dtype=torch.bfloat16, **NUMBERS)
    before = [p.detach().float().clone() for p in mine]
    train(optimizer, mine, 20)
    train(torch.optim.AdamW(theirs, **NUMBERS), theirs, 20)
    assert optimizer.state[mine[0]]["exp_avg"].dtype == torch.bfloat16
    for one, other, start in zip(mine, theirs, before, strict=True):
        assert one.dtype == dtype
        moved = (other - start).norm()
        assert (one.float() - other).norm() / moved < (0.02 if dtype == torch.float32 else 0.35)


def test_rounding_is_right_on_average():
    """1 + 2^-10 lies an eighth of the way from 1 to the next bfloat16."""
    value = torch.full((100_000,), 1 + 2**-10)
    into = torch.empty(100_000, dtype=torch.bfloat16)
    store(into, value, torch.Generator().manual_seed(0))
    assert set(into.tolist()) == {1.0, 1 + 2**-7}
    assert into.float().mean().item() == pytest.approx(1 + 2**-10, abs=3e-5)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.0])
    kept = torch.empty(6, dtype=torch.bfloat16)
    store(kept, special, torch.Generator().manual_seed(0))
    assert torch.equal(kept.float().nan_to_num(7), special.nan_to_num(7))


def test_small_updates_of_bfloat16_weights_are_not_lost(way):
    p = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = AdamW([p], **{**NUMBERS, "lr": 1e-4, "weight_decay": 0.0}, state_dtype=torch.float32)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.detach().float().mean().item() == pytest.approx(1 - 20e-4, abs=3e-4)


KINDS = [
    pytest.param(lambda params: AdamW(params, state_dtype=torch.bfloat16, **NUMBERS), id="bfloat16"),
    pytest.param(lambda params: AdamW8bit(params, **NUMBERS), id="8bit", marks=needs_bitsandbytes),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", KINDS)
def test_resumed_equals_uninterrupted_bit_for_bit(make, dtype, way):
    whole, first = parameters(dtype), parameters(dtype)
    train(make(whole), whole, 6)
    optimizer = make(first)
    train(optimizer, first, 3)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = make(second)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(first, second, strict=True):
        for name, value in optimizer.state[p].items():
            assert resumed.state[q][name].dtype == value.dtype, name
            assert torch.equal(resumed.state[q][name], value), name
    train(resumed, second, 3, first=3)
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


@pytest.mark.parametrize(
    ("make", "bytes_"), [(AdamW, 2 * 2 * 8192), (AdamW8bit, 2 * (8192 + 4 * 8192 // 256))]
)
def test_tensors_without_memory_have_the_same_states(make, bytes_):
    """As `octavo estimate` asks, also where bitsandbytes is not installed."""
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(64, 128, dtype=torch.bfloat16))
        p.grad = torch.empty_like(p)
        optimizer = make([p], **NUMBERS)
        optimizer.step()
        states = [value for name, value in optimizer.state[p].items() if name != "step"]
        assert sum(t.numel() * t.element_size() for t in states) == bytes_


@needs_bitsandbytes
def test_8bit_moments_step_nearly_alike():
    mine, theirs = parameters(), parameters()
    before = [p.detach().clone() for p in mine]
    optimizer = AdamW8bit(mine, **NUMBERS)
    train(optimizer, mine, 10)
    train(torch.optim.AdamW(theirs, **NUMBERS), theirs, 10)
    assert optimizer.state[mine[0]]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[mine[1]]["exp_avg"].dtype == torch.float32  # too small to be worth it
    for one, other, start in zip(mine, theirs, before, strict=True):
        assert (one - other).norm() / (other - start).norm() < 0.1
