"""State dicts are plain: a converted model saves what the unconverted model would have saved, at any moment,
and restores it.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.float8 import (
    FULL,
    RECIPES,
    Cast,
    Float8Linear,
    Float8LinearConfig,
    Gemm,
    Recipe,
    cast_weights_once,
    convert_to_float8_training,
)
from octavo.float8.health import Monitor

_FINE = Cast(torch.float8_e4m3fn, (1, 16))
OWN = Recipe("own", Gemm(_FINE, _FINE), Gemm(_FINE, Cast(torch.float8_e4m3fn, (8, FULL))), Gemm(None, None))
CONFIGS: dict[str, Any] = {
    **{name: name for name in RECIPES},
    "options": Float8LinearConfig(round_scales_to_power_of_2=True, emulate=True),
    "own": OWN,
}
MOMENTS = ["fresh", "trained", "in the scope", "while monitored"]

pytestmark = pytest.mark.filterwarnings("ignore::octavo.float8.EmulationWarning")


class Model(nn.Module):
    """A buffer, a norm, biases or none, and one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.norm = nn.RMSNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head(h + self.down(torch.relu(self.up(self.norm(h)))))


IDS = torch.arange(24).view(2, 12)


def pair(config: Any) -> tuple[nn.Module, nn.Module]:
    """A bfloat16 model and a converted one that starts from its values."""
    torch.manual_seed(0)
    plain = Model().bfloat16()
    return plain, convert_to_float8_training(copy.deepcopy(plain), config=config)


def step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(IDS).float().square().mean().backward()
    optimizer.step()


def at(moment: str, model: nn.Module) -> AbstractContextManager[Any]:
    """Bring `model` to `moment`; returns the scope in which it lasts."""
    if moment != "fresh":
        step(model)
    if moment == "in the scope":
        return cast_weights_once(model)
    if moment == "while monitored":
        return Monitor(model).step()
    return nullcontext()


@pytest.fixture(params=[(c, m) for c in CONFIGS for m in MOMENTS], ids=lambda p: f"{p[0]}, {p[1]}")
def models(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module]]:
    config, moment = request.param
    plain, ours = pair(CONFIGS[config])
    with at(moment, ours):
        ours(IDS).float().square().mean().backward()
        yield plain, ours


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name, t in a.items():
        assert type(t) is type(b[name]) is Tensor, name
        assert (t.dtype, t.shape, t.stride()) == (b[name].dtype, b[name].shape, b[name].stride()), name
        assert torch.equal(t, b[name]), name


def test_names_types_and_layout_are_the_plain_models(models: tuple[nn.Module, nn.Module]) -> None:
    plain, ours = models
    state = ours.state_dict()
    plain.load_state_dict(state)
    assert_same(state, plain.state_dict())
    assert state._metadata == plain.state_dict()._metadata
    for (name, p), (other, q) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert type(p) is type(q) is nn.Parameter
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert ours.state_dict()["up.weight"].data_ptr() == ours.up.weight.data_ptr()  # not a copy
    # Tied weights stay tied.
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


def test_states_go_through_files_to_a_plain_model_and_back(
    models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    plain, ours = models
    state = ours.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_same(loaded, state)
    plain.load_state_dict(loaded)
    assert_same(plain.state_dict(), state)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    ours.load_state_dict(plain.state_dict())
    assert_same(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_after_a_load_it_computes_with_the_new_values(config: str, moment: str) -> None:
    _, ours = pair(CONFIGS[config])
    other = convert_to_float8_training(Model().bfloat16(), config=CONFIGS[config])
    with at(moment, ours):
        ours(IDS).float().square().mean().backward()
    for assign in (False, True):
        with torch.no_grad():
            other.up.weight.mul_(1.5)
        ours.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(ours(IDS), other(IDS))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_states_go_through_distributed_checkpoints(config: str, moment: str, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    plain, ours = pair(CONFIGS[config])
    with at(moment, ours):
        ours(IDS).float().square().mean().backward()
        want = copy.deepcopy(ours.state_dict())
        dcp.save(get_model_state_dict(ours), checkpoint_id=tmp_path / "ours", no_dist=True)
    state = get_model_state_dict(plain)
    dcp.load(state, checkpoint_id=tmp_path / "ours", no_dist=True)
    set_model_state_dict(plain, state)
    assert_same(plain.state_dict(), want)

    dcp_to_torch_save(tmp_path / "ours", tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    assert all(torch.equal(one[name], t) for name, t in want.items())

    with torch.no_grad():
        plain.up.weight.mul_(2)
    dcp.save(get_model_state_dict(plain), checkpoint_id=tmp_path / "plain", no_dist=True)
    state = get_model_state_dict(ours)
    dcp.load(state, checkpoint_id=tmp_path / "plain", no_dist=True)
    set_model_state_dict(ours, state)
    assert_same(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_states_go_through_safetensors(config: str, moment: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    plain, ours = pair(CONFIGS[config])
    with at(moment, ours):
        ours(IDS).float().square().mean().backward()
        save_model(ours, str(tmp_path / "ours.safetensors"))  # supports tied weights
        want = copy.deepcopy(ours.state_dict())
    load_model(plain, tmp_path / "ours.safetensors")
    assert_same(plain.state_dict(), want)
    with torch.no_grad():
        plain.up.weight.mul_(2)
    save_model(plain, str(tmp_path / "plain.safetensors"))
    load_model(ours, tmp_path / "plain.safetensors")
    assert_same(ours.state_dict(), plain.state_dict())


def test_files_are_read_where_octavo_is_not_installed(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    for i, config in enumerate(CONFIGS.values()):
        _, ours = pair(config)
        with at("in the scope", ours):
            state = ours.state_dict()
            torch.save(state, tmp_path / f"{i}.pt")
            save_file({n: t.clone() for n, t in state.items()}, tmp_path / f"{i}.safetensors")
            with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
                dcp.save(state, checkpoint_id=tmp_path / str(i), no_dist=True)
    program = f"""
import sys, warnings
sys.modules["octavo"] = None
warnings.simplefilter("ignore")
import torch, torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
for i in range({len(CONFIGS)}):
    a = torch.load(f"{{i}}.pt", weights_only=True)
    b = load_file(f"{{i}}.safetensors")
    c = {{name: torch.empty_like(t) for name, t in a.items()}}
    dcp.load(c, checkpoint_id=str(i), no_dist=True)
    assert a.keys() == b.keys() == c.keys()
    assert all(type(t) is torch.Tensor and t.dtype in (torch.bfloat16, torch.float32) for t in a.values())
    assert all(torch.equal(t, b[n]) and torch.equal(t, c[n]) for n, t in a.items())
print(len(a))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(Model().state_dict())


def test_whole_modules_pickle_and_copy(models: tuple[nn.Module, nn.Module]) -> None:
    """As in the tutorial: torch.save(model), and torch.load without weights_only."""
    _, ours = models
    ours.zero_grad()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    want = ours(IDS).detach()
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
        assert_same(other.state_dict(), ours.state_dict())
        for mine, its in zip(ours.modules(), other.modules(), strict=True):
            assert type(mine) is type(its)
            if isinstance(its, Float8Linear):
                assert (its.recipe, its.config, its.emulate) == (mine.recipe, mine.config, mine.emulate)
                assert its.weight_cache.casts is None
                assert its.watch is None
        assert torch.equal(other(IDS), want)
        before = other.up.weight.detach().clone()
        step(other)  # it trains, and on its own weights
        assert not torch.equal(other.up.weight, before)
        assert torch.equal(ours.up.weight, before)
        assert not torch.equal(other(IDS), want)


def test_a_pickle_holds_no_float8() -> None:
    """A module saved inside the scope is no larger than one saved outside."""
    _, ours = pair("rowwise")

    def size() -> int:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        return len(buffer.getvalue())

    outside = size()
    with cast_weights_once(ours):
        assert size() == outside


@pytest.mark.parametrize("config", CONFIGS)
def test_optimizer_states_are_plain(config: str) -> None:
    plain, ours = pair(CONFIGS[config])
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ours, plain)]
    for model, optimizer in zip((ours, plain), optimizers, strict=True):
        with cast_weights_once(model):
            model(IDS).float().square().mean().backward()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizers[0].state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state.keys() == optimizers[1].state_dict().keys()
    for index, entry in optimizers[1].state_dict()["state"].items():
        for name, t in entry.items():
            mine = state["state"][index][name]
            assert type(mine) is Tensor
            assert (mine.dtype, mine.shape) == (t.dtype, t.shape)
    optimizers[1].load_state_dict(state)
