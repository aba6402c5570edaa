"""Delayed scaling under a pipeline schedule, in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from octavo.float8 import DelayedScaling, convert_to_float8_training

MICROBATCHES = 4


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build() -> nn.Sequential:
    torch.manual_seed(0)
    halves = (nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)) for _ in range(2))
    model = nn.Sequential(*halves)
    convert_to_float8_training(model, config="tensorwise_previous_step")
    return model


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Microbatches that grow: within a step, a scale that followed them would show."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * MICROBATCHES, 16, generator=generator)
    growing = (1 + seed) * torch.arange(1, MICROBATCHES + 1).repeat_interleave(8)[:, None]
    return x * growing, torch.randn(x.shape, generator=generator)


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")  # torch's own, of a pipeline of one rank
def test_a_step_of_microbatches_has_one_scale() -> None:
    plain = build()
    piped = copy.deepcopy(plain)
    one, other = DelayedScaling(plain, bound=1), DelayedScaling(piped, bound=1)
    stage = PipelineStage(piped, 0, 1, torch.device("cpu"))
    run = ScheduleGPipe(stage, MICROBATCHES, loss_fn=loss, scale_grads=False)
    for step in range(3):
        x, target = batch(step)
        before = {name: operand.previous_amax.item() for name, operand in other.statistics.items()}
        plain.zero_grad()
        piped.zero_grad()
        run.step(x, target=target)
        for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            loss(plain(part), wanted).backward()
        for got, want in zip(piped.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad)
        for name, operand in other.statistics.items():
            assert operand.previous_amax.item() == before[name]
            assert operand.current_amax == one.statistics[name].current_amax, name
            assert operand.counts.tolist() == one.statistics[name].counts.tolist(), name
        report = one.end_step()
        assert other.end_step() == report
    assert not report.just_in_time
    assert report.saturated > 0
