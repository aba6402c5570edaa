"""A job that cannot fit is refused before its data is read."""

from types import SimpleNamespace

import pytest
import torch

from octavo import models
from octavo.config import ConfigError, JobConfig
from octavo.config.parallel_dims import ParallelDims
from octavo.optim.optimizer import build_optimizer
from octavo.train import memory_check
from octavo.train.memory_check import bytes_per_parameter
from tests.helpers import launching


@pytest.mark.parametrize(
    ("name", "state_dtype", "dtype", "expected"),
    [
        ("AdamW", "float32", "float32", 16),
        ("AdamW", "bfloat16", "float32", 12),
        ("AdamW", "bfloat16", "bfloat16", 8),
        ("AdamW8bit", "float32", "float32", 10),
        ("Adam", "bfloat16", "float32", 16),  # as a file may say, without effect
    ],
)
def test_bytes_per_parameter(name, state_dtype, dtype, expected):
    job = JobConfig()
    job.optimizer.name, job.optimizer.state_dtype, job.training.dtype = name, state_dtype, dtype
    assert bytes_per_parameter(job) == expected


@pytest.mark.parametrize(
    ("world", "flags"), [(1, {}), (2, {"parallelism.pipeline_parallel_degree": 2})], ids=["one", "pipeline"]
)
def test_a_model_that_cannot_fit_is_refused_before_its_data_is_read(world, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    monkeypatch.setattr(memory_check, "host_memory", lambda: 98_000_000)  # 6,163,712 parameters x 16 bytes
    run = launching.train(tmp_path, flags, world=world)
    assert run.exit_codes == [2] * world
    assert "model.flavor = debugmodel: its parameters, gradients and optimizer states alone take" in run.log
    assert "to start all the same, add --job.ignore_memory" in run.log
    assert "Data:" not in run.log


def test_a_job_may_ignore_what_memory_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_check, "host_memory", lambda: 10**6)
    flags = {**launching.shallow(2), "job.ignore_memory": True, "training.steps": 2}
    assert launching.train(tmp_path, flags).exit_codes == [0]


def test_the_count_is_that_of_the_real_states(monkeypatch):
    """The smallest memory that is not refused is what parameters, gradients and moments take."""
    job, spec = JobConfig(), models.get("llama3")
    args = spec.configure(spec.args("debugmodel"), 2048, 64)
    model = spec.build(args)
    optimizer = build_optimizer(model, job.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [
        t for state in optimizer.state.values() for key, t in state.items() if key.startswith("exp_avg")
    ]
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    world = SimpleNamespace(pipeline=None, layout=ParallelDims())

    def check(memory: int) -> None:
        monkeypatch.setattr(memory_check, "host_memory", lambda: memory)
        memory_check.require_memory(job, args, None, world=world, device=torch.device("cpu"))

    total = sum(tensor.nbytes for tensor in held)
    check(total)
    with pytest.raises(ConfigError):
        check(total - 1)
