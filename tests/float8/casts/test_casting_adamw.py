"""AdamW that casts weights: torch's step, torch's state, and casts that the next step reuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from octavo.float8 import Float8AdamW, Float8Linear, cast_weights_once, convert_to_float8_training
from octavo.float8.casts import weights_once
from octavo.float8.casts.operands import cast_weight

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


pytestmark = pytest.mark.filterwarnings("ignore::octavo.float8.matmul.EmulationWarning")


def build(recipe: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 16, bias=False))
    convert_to_float8_training(model, config=recipe)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[Tensor]:
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        x = torch.randn(24, 32, generator=torch.Generator().manual_seed(step))
        with cast_weights_once(model):
            loss = model(x).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise", "mxfp8"])
def test_it_is_adamw_and_casts_as_the_next_step_would(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = build(recipe), build(recipe)
    want = train(plain, torch.optim.AdamW(plain.parameters(), **OPTIONS), 4)
    optimizer = Float8AdamW(model.parameters(), model=model, **OPTIONS)
    got = train(model, optimizer, 2)
    # From here on no step casts a weight but the optimizer's.
    casts = []
    monkeypatch.setattr(weights_once, "cast_weight", lambda *args, **kwargs: casts.append(args))
    got += train(model, optimizer, 2, 2)
    assert not casts
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_casts_are_bitwise_those_of_the_new_weight(recipe: str) -> None:
    model = build(recipe)
    train(model, Float8AdamW(model.parameters(), model=model, **OPTIONS), 1)
    with cast_weights_once(model):
        for module in model.modules():
            if not isinstance(module, Float8Linear):
                continue
            want = cast_weight(module.weight.detach(), module.recipe, for_grad_input=True)
            assert module.weight_cache.casts is not None
            for got, wanted in zip(module.weight_cache.casts, want, strict=True):
                assert got is not None
                assert wanted is not None
                assert torch.equal(got.data.view(torch.uint8), wanted.data.view(torch.uint8))
                assert torch.equal(got.scale, wanted.scale)


def test_state_dicts_are_interchangeable() -> None:
    one, other = build("tensorwise"), build("tensorwise")
    first = Float8AdamW(one.parameters(), model=one, **OPTIONS)
    train(one, first, 2)
    other.load_state_dict(one.state_dict())
    second = torch.optim.AdamW(other.parameters(), **OPTIONS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch takes the tensors themselves
    assert second.state_dict().keys() == first.state_dict().keys()
    want = train(one, first, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(train(other, second, 2, 2), want, strict=True))
    first.load_state_dict(second.state_dict())


def test_a_weight_written_to_after_the_step_is_cast_anew() -> None:
    model = build("tensorwise")
    train(model, Float8AdamW(model.parameters(), model=model, **OPTIONS), 1)
    layer = model[0]
    assert isinstance(layer, Float8Linear)
    with torch.no_grad():
        layer.weight.mul_(2)
    with cast_weights_once(model):
        assert layer.weight_cache.casts is not None
        got = layer.weight_cache.casts[0]
        want = cast_weight(layer.weight.detach(), layer.recipe, for_grad_input=False)[0]
        assert got is not None
        assert want is not None
        assert torch.equal(got.scale, want.scale)


def test_a_closure_gives_the_loss_and_a_model_without_float8_is_refused() -> None:
    model = build("tensorwise")
    optimizer = Float8AdamW(model.parameters(), model=model, **OPTIONS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 32)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    with pytest.raises(ValueError, match="Linear has none: call convert_to_float8_training"):
        Float8AdamW(model.parameters(), model=nn.Linear(2, 2))
