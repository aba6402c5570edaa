"""A pipeline computes what the whole model does, with as many matrix products, under every schedule."""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.config.schema import JobConfig
from octavo.distributed.pipeline_parallel import Activations, Pipeline
from octavo.distributed.stages import LocalStages, cut
from octavo.families import ModelArgs
from octavo.float8 import cast_weights_once, convert_to_float8_training
from octavo.float8.matmul import PRODUCTS
from octavo.models.init import init_weights
from octavo.models.transformer import Transformer
from octavo.preflight.pipeline_plan import SCHEDULES, plan_of
from octavo.preflight.sizes import units
from octavo.train.step import cross_entropy_sum
from tests.helpers import ranks

ARGS = ModelArgs(dim=32, n_layers=5, n_heads=2, n_kv_heads=2, hidden_dim=48, vocab_size=64, max_seq_len=16)
BATCH, LENGTH = 4, 16
SPLITTING = [name for name, schedule in SCHEDULES.items() if schedule.splits]
NAMED = [name for name, schedule in SCHEDULES.items() if not schedule.csv]
# Stage 0 of process 0, stage 1 of process 1; the weights' gradients come last.
BY_HAND = "0F0,0F1,0F2,0F3,0B0,0B1,0I2,0W2,0B3\n1F0,1I0,1F1,1I1,1F2,1I2,1F3,1I3,1W0,1W1,1W2,1W3\n"


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def job_for(schedule: str, csv: str | None = None, degree: int = 2) -> JobConfig:
    job = JobConfig()
    if schedule.startswith("bare "):  # the embedding and the head are stages of their own
        schedule = schedule.removeprefix("bare ")
        job.parallelism.pipeline_parallel_split_points = ["layers.0", "layers.2", "norm"]
    job.training = replace(job.training, local_batch_size=BATCH)
    job.activation_checkpoint = replace(job.activation_checkpoint, mode="none")
    job.parallelism = replace(
        job.parallelism,
        pipeline_parallel_degree=degree,
        pipeline_parallel_schedule=schedule,
        pipeline_parallel_schedule_csv=csv,
    )
    return job


def whole(recipe: str | None) -> nn.Module:
    with torch.device("meta"):
        model = Transformer(ARGS)
    if recipe is not None:
        convert_to_float8_training(model, config=recipe)
    return model


def ready(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    init_weights(model, seed=1)
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(64, (2, BATCH, LENGTH), generator=generator).unbind(0)


def pipeline_of(job: JobConfig, recipe: str | None, on_progress=lambda: None) -> tuple[Pipeline, LocalStages]:
    mesh = init_device_mesh("cpu", (job.parallelism.pipeline_parallel_degree,), mesh_dim_names=("pp",))
    plan = plan_of(job, units(ARGS))
    numbers = plan.stages_of(mesh.get_local_rank())
    stages = [ready(cut(whole(recipe), plan.stages[number])) for number in numbers]
    pipeline = Pipeline(
        stages,
        plan,
        mesh,
        Activations(ARGS.dim, 1, torch.float32),
        tokens_shape=(BATCH, LENGTH),
        device=torch.device("cpu"),
        progress=on_progress,
    )
    return pipeline, LocalStages(stages, numbers)


def measured(schedule: str, recipe: str | None, csv: str | None, held: bool) -> dict[str, Any]:
    """Two steps on this rank: the loss, the gradients, and matrix products a linear and microbatch."""
    calls = Counter()
    pipeline, parts = pipeline_of(job_for(schedule, csv), recipe, lambda: calls.update(["progress"]))
    tokens, labels = batch()
    linears = sum(isinstance(module, nn.Linear) for module in parts.modules())
    with Products() as products, cast_weights_once(parts, enabled=held):
        losses = [float(pipeline.gradients(tokens, labels, cross_entropy_sum)) for _ in range(2)]
    logits = pipeline.forward(tokens[:3, :8])
    return {
        "losses": losses,
        "grads": {name: parameter.grad.numpy() for name, parameter in parts.named_parameters()},
        "products": products.count / (2 * BATCH * linears),
        "progress": calls["progress"],
        "logits": None if logits is None else logits.numpy(),
    }


# What float8 adds is how often products and casts are made: in a whole backward and in one that is split,
# with one stage a process and with two.
IN_FLOAT8 = [("1F1B", "tensorwise"), ("Interleaved1F1B", "rowwise"), ("ZBVZeroBubble", "rowwise")]
IN_FLOAT8 += [("InterleavedZeroBubble", "tensorwise"), ("by hand", "rowwise")]


@pytest.mark.parametrize(
    ("schedule", "recipe"),
    [
        *((schedule, None) for schedule in (*NAMED, "by hand", "bare InterleavedZeroBubble")),
        *IN_FLOAT8,
        *(
            pytest.param(schedule, recipe, marks=pytest.mark.slow)
            for schedule in (*NAMED, "by hand")
            for recipe in ("tensorwise", "rowwise")
            if (schedule, recipe) not in IN_FLOAT8
        ),
    ],
)
def test_a_pipeline_computes_what_the_whole_model_does(
    schedule: str, recipe: str | None, tmp_path: Path
) -> None:
    csv = None
    if schedule == "by hand":
        csv = tmp_path / "schedule.csv"
        csv.write_text(BY_HAND)
        schedule, csv = "PipelineScheduleSingle", str(csv)
    results = ranks.run(2, measured, schedule, recipe, csv, recipe == "rowwise")
    model, (tokens, labels) = ready(whole(recipe)), batch()
    total = 0.0
    for _ in range(2):
        for sequence, wanted in zip(tokens.split(1), labels.split(1), strict=True):
            loss = cross_entropy_sum(model(sequence), wanted)
            loss.backward()
            total += float(loss.detach())
    got = {name: grad for rank in results for name, grad in rank["grads"].items()}
    assert sum(rank["losses"][0] + rank["losses"][1] for rank in results) == pytest.approx(total, rel=1e-6)
    assert set(got) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(got[name]), parameter.grad, rtol=1e-4, atol=1e-5)
    assert [rank["products"] for rank in results] == [3.0, 3.0]
    assert all(rank["progress"] >= 4 * BATCH for rank in results)
    logits = [torch.from_numpy(rank["logits"]) for rank in results if rank["logits"] is not None]
    with torch.no_grad():
        torch.testing.assert_close(logits, [model(tokens[:3, :8])], rtol=1e-5, atol=1e-5)


def test_every_schedule_that_splits_backward_is_among_them() -> None:
    assert set(SPLITTING) == {"InterleavedZeroBubble", "ZBVZeroBubble"}


def microbatches_that_run(schedule: str, degree: int) -> list[int]:
    """For which numbers of microbatches torch makes the schedule, and this process's order ends."""
    from octavo.preflight import pipeline_plan as rules

    fine = []
    for count in range(1, 10):
        job = job_for(schedule, degree=degree)
        job.training = replace(job.training, local_batch_size=count)
        if not list(rules.problems(job)):
            pipeline = _made(job)
            assert pipeline is not None, f"torch refuses {count} microbatches"
            fine.append(count)
        else:
            assert _made(job) is None, f"torch takes {count} microbatches"
    return fine


def _made(job: JobConfig) -> Pipeline | None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))
    plan = plan_of(job, units(replace(ARGS, n_layers=8)))
    stages: list[nn.Module] = [nn.Linear(1, 1) for _ in plan.stages_of(mesh.get_local_rank())]
    try:
        return Pipeline(
            stages,
            plan,
            mesh,
            Activations(ARGS.dim, 1, torch.float32),
            tokens_shape=(job.training.local_batch_size, LENGTH),
            device=torch.device("cpu"),
            progress=lambda: None,
        )
    except ValueError:
        return None


def test_the_numbers_of_microbatches_refused_are_those_that_torch_refuses() -> None:
    (found, *rest) = ranks.run(3, all_that_run, 3)
    assert all(other == found for other in rest)
    assert found["1F1B"] == [3, 4, 5, 6, 7, 8, 9]
    assert found["GPipe"] == found["LoopedBFS"] == found["ZBVZeroBubble"] == list(range(1, 10))
    assert found["Interleaved1F1B"] == found["InterleavedZeroBubble"] == [1, 2, 3, 4, 5, 6, 8, 9]


def all_that_run(degree: int) -> dict[str, list[int]]:
    return {schedule: microbatches_that_run(schedule, degree) for schedule in NAMED}


def test_a_stage_has_the_names_of_the_whole() -> None:
    model = whole(None)
    plan = plan_of(job_for("ZBVZeroBubble"), units(ARGS))
    stages = [cut(model, names) for names in plan.stages]
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    parts = LocalStages([stages[0], stages[3]], [0, 3])
    assert {name: id(p) for name, p in parts.named_parameters()} == {
        name: id(p) for stage in (stages[0], stages[3]) for name, p in stage.named_parameters()
    }
    assert parts.depth("layers.0.attention.wq") == 0
    assert parts.depth("layers.0") == 0
    assert parts.depth("output.weight") == 3
    copied = copy.deepcopy(parts)
    assert copied.depth("output") == 3
