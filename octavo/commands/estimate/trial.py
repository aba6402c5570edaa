"""One process of a job, of any number of processes, run for a step on tensors without memory.

The process group is fake: collectives return at once and move nothing. Everything else is the trainer's own:
mesh, conversion, parallelisation, optimizer and the code of a step; so layouts, float8, checkpointing and
sharding are the real ones. Layers run eagerly also where the job compiles them (see docs/estimate.md).

Under a GPU's name the tensors still call themselves CPU tensors, as a build of PyTorch for CPUs knows no
others. What a GPU does otherwise is put in by hand: bfloat16, float8 products in hardware, and casts by
kernels, which need no scratch memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo import models
from octavo.commands.estimate.forked import apart
from octavo.commands.estimate.layer_costs import Grown, grown, left_out, watch, without
from octavo.commands.estimate.memory_tracker import (
    COMMUNICATION,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    Log,
    MemoryTracker,
)
from octavo.commands.estimate.microbatches import Fewer, NotAlike, Stretched, fewer, shorten, stretched
from octavo.commands.estimate.operations import Counts, Message, Operations
from octavo.commands.estimate.stand_in_tokenizer import tokenizer_of
from octavo.config import JobConfig
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.config.pipeline_plan import PipelinePlan
from octavo.distributed import mesh
from octavo.metrics.device import choose_param_dtype
from octavo.optim.optimizer import build_optimizer, clip_gradients
from octavo.roofline import Gpu
from octavo.train import quantization
from octavo.train.build_model import build_model, model_args, pipeline_plan
from octavo.train.trainer import Trainer, loss_sum

_MICROBATCHES = 2
"""As many as it takes until another one changes no peak: it finds gradients to add to."""


@dataclass(frozen=True)
class Trial:
    """What one process's step showed.

    log: its allocations. microbatch, rest: products, attention and messages of the microbatches traced, and
    of the rest of the step. parameters: of this process, all_parameters: of the model. microbatches: a step
    has, traced: so many of them. stages: of the whole pipeline.
    """

    rank: int
    layout: ParallelDims
    log: Log | Stretched | Grown
    microbatch: Counts
    rest: Counts
    parameters: int
    all_parameters: int
    flops_per_token: float
    microbatches: int
    args: Any
    stages: int
    traced: int


@contextmanager
def fake_processes(rank: int, size: int) -> Iterator[None]:
    """Be process `rank` of `size` that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Trace:
    """One process's step, of a model with some of the layers: its log, its counts, and its parameters."""

    log: Log | Stretched
    microbatch: Counts
    rest: Counts
    parameters: int


def run_trials(job: JobConfig, size: int, ranks: Sequence[int], gpu: Gpu | None = None) -> list[Trial]:
    """The trials of processes `ranks` of `size`, on a `gpu`, or on this CPU (None), in forks.
    `ConfigError` as training.
    """
    lesses = _lesses(job)
    calls = [{"rank": rank, "gpu": gpu, "less": less} for rank in ranks for less in lesses]
    traces: list[Trace] = apart(trace, (job, size), calls)
    each = len(lesses)
    return [
        _trial(job, size, rank, lesses[0], traces[each * number : each * (number + 1)])
        for number, rank in enumerate(ranks)
    ]


def run_trial(
    job: JobConfig, size: int, *, rank: int = 0, gpu: Gpu | None = None, whole: bool = False
) -> Trial:
    """The trial of process `rank`, in this process; `whole`: no layers and microbatches are left out."""
    lesses = (0,) if whole else _lesses(job)
    traces = [trace(job, size, rank=rank, gpu=gpu, less=less, whole=whole) for less in lesses]
    return _trial(job, size, rank, lesses[0], traces)


def prepared(job: JobConfig) -> tuple[Any, PipelinePlan | None]:
    """The model's arguments, and the plan of its pipeline."""
    models.import_custom(job.experimental.custom_import, job.model.name)
    args = model_args(job, tokenizer_of(job))
    return args, pipeline_plan(job, args)


def _lesses(job: JobConfig) -> tuple[int, ...]:
    """How many layers each of the traces that it takes leaves out of each stage."""
    less = left_out(job, *prepared(job))
    return (less, less - 1) if less else (0,)


def _trial(job: JobConfig, size: int, rank: int, less: int, traces: Sequence[Trace]) -> Trial:
    """What `traces` of one process show: one of all layers, or two, without `less` and `less` - 1."""
    args, plan = prepared(job)
    all_parameters, flops_per_token = _size(job, args)
    microbatches, traced = _microbatches(job, size)
    short, long = traces[0], traces[-1]
    return Trial(
        rank=rank,
        layout=parallel_dims_of(job.parallelism, size),
        log=Grown(short.log, long.log, less) if less else short.log,
        microbatch=grown(short.microbatch, long.microbatch, less),
        rest=grown(short.rest, long.rest, less),
        parameters=short.parameters + less * (long.parameters - short.parameters),
        all_parameters=all_parameters,
        flops_per_token=flops_per_token,
        microbatches=microbatches,
        args=args,
        stages=1 if plan is None else len(plan.stages),
        traced=traced,
    )


def _microbatches(job: JobConfig, size: int) -> tuple[int, int]:
    """Local batches that a step has, and how many of them are traced."""
    one_pass = job.training.local_batch_size * parallel_dims_of(job.parallelism, size).data
    microbatches = max(job.training.global_batch_size, one_pass) // one_pass
    return microbatches, min(microbatches, _MICROBATCHES)


def trace(
    job: JobConfig, size: int, *, rank: int, gpu: Gpu | None, less: int = 0, whole: bool = False
) -> Trace:
    """Trace process `rank` of `size` with `less` layers fewer in each stage, and if it is in a pipeline, with
    fewer microbatches, unless `whole`.
    """
    args, plan = prepared(job)
    job = _eager(job)
    layout = parallel_dims_of(job.parallelism, size)
    microbatches, traced = _microbatches(job, size)
    with fake_processes(rank, size), ExitStack() as scopes:
        if gpu:
            scopes.enter_context(quantization.simulate_gpu(gpu.capability))
        device = torch.device("cpu")
        world = mesh.build_world(device, layout, loss_parallel=not job.parallelism.disable_loss_parallel)
        place = 0 if world.pipeline is None else world.pipeline.get_local_rank()
        few = None if plan is None or whole else fewer(plan, place)

        def run(few: Fewer | None) -> Trace:
            return _trace(job, *without(args, plan, less), world, gpu, microbatches, traced, few)

        try:
            found = run(few)
        except NotAlike:
            found = run(None)
        if plan is not None:
            message = Message("send", "pipeline", layout.pipeline)
            found.microbatch.messages[message] += traced * _handed_on(
                job, plan, place, layout, args, bool(gpu)
            )
    return found


def _handed_on(
    job: JobConfig, plan: PipelinePlan, place: int, layout: ParallelDims, args: Any, on_gpu: bool
) -> int:
    """Bytes of activations, and of their gradients, that process `place` of a pipeline sends to others in one
    local batch. They are handed on outside of what is traced.
    """
    pipeline = models.get(job.model.name).pipeline
    assert pipeline is not None
    dtype = choose_param_dtype(job.training.mixed_precision_param, torch.device("cuda" if on_gpu else "cpu"))
    mine, last = plan.stages_of(place), len(plan.stages) - 1
    forward = sum(stage < last and plan.process_of[stage + 1] != place for stage in mine)
    backward = sum(stage > 0 and plan.process_of[stage - 1] != place for stage in mine)
    positions = job.training.local_batch_size * job.training.seq_len // (layout.context * layout.tensor)
    return (forward + backward) * positions * pipeline.width(args) * dtype.itemsize


def _trace(
    job: JobConfig,
    args: Any,
    plan: PipelinePlan | None,
    world: mesh.World,
    gpu: Gpu | None,
    microbatches: int,
    traced: int,
    few: Fewer | None,
) -> Trace:
    """One step of `traced` microbatches of the model with `args`, or of this process's stages of it; under a
    pipeline with a schedule for `few` of what it cuts them into.
    """
    device, layout = torch.device("cpu"), world.layout
    dtype = choose_param_dtype(job.training.mixed_precision_param, torch.device("cuda" if gpu else "cpu"))
    recipe = quantization.recipe_name(job.model.converters, job.float8)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    operations = Operations(layout)

    def materialise(part: nn.Module) -> None:
        if gpu:
            quantization.force_hardware_path(part)
        with fake:
            part.to_empty(device=device)

    model, _, stages = build_model(
        job,
        args,
        recipe,
        device=device,
        param_dtype=dtype,
        world=world,
        pipeline=plan,
        materialise=materialise,
        copies=gpu is None,
    )
    step: Any = object.__new__(Trainer)  # its methods that compute, without what it reads and writes
    vars(step).update(
        job=job,
        world=world,
        model=model,
        model_args=args,
        device=device,
        param_dtype=dtype,
        accumulation=traced,
        chunked=job.training.loss_chunk_tokens is not None,
        loss_sum=loss_sum,
        global_tokens=job.training.local_batch_size * layout.data * microbatches * job.training.seq_len,
        watchdog=SimpleNamespace(progress=lambda: None),
        pipeline=None,
    )
    if step.chunked:
        step.loss_sum = lambda tokens, labels: model(tokens, labels_BS=labels)
    tracker = MemoryTracker(fake, operations.see)
    watch(stages or [model], tracker)
    with fake:
        for part in stages or [model]:
            quantization.gather_in_float8(part)
    with _aside(tracker), fake:
        if plan is not None:
            step.pipeline = step._pipeline(plan, stages)
            if few is not None:
                shorten(step.pipeline, few, tracker, operations.note)
        optimizer = build_optimizer(model, job.optimizer)
        parameters = list(model.parameters())
        with tracker:
            tracker.claim([*parameters, *model.buffers()], PARAMETERS)
            _first_update(parameters, optimizer)
            tracker.claim([v for state in optimizer.state.values() for v in state.values()], OPTIMIZER)
            _step(step, optimizer, tracker, operations, traced)
            tracker.claim([p.grad for p in parameters if p.grad is not None], GRADIENTS)
    log: Log | Stretched = tracker.log
    counts = operations.microbatches
    if few is not None:
        log = Stretched(tracker.log, few)
        log.peaks()  # `NotAlike` is raised here, if it is
        counts = stretched(counts, operations.noted, few)
    return Trace(log, counts, operations.rest, sum(_local(p).numel() for p in parameters))


def _eager(job: JobConfig) -> JobConfig:
    """`job` without compilation, and with everything on one device: what is offloaded is subtracted later."""
    changed = replace(
        job,
        compile=replace(job.compile, enable=False),
        training=replace(job.training, enable_cpu_offload=False),
    )
    changed.given, changed.where = job.given, job.where
    return changed


def _size(job: JobConfig, args: Any) -> tuple[int, float]:
    """(parameters, FLOPs per token) of the whole model."""
    spec = models.get(job.model.name)
    with torch.device("meta"):
        model = spec.build(args)
    return sum(p.numel() for p in model.parameters()), spec.flops_per_token(args, model, job.training.seq_len)


def _local(parameter: Tensor) -> Tensor:
    local = getattr(parameter, "to_local", None)
    return parameter if local is None else local()


def _first_update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """An update without a forward pass, which makes the optimizer's states."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _step(
    step: Any,
    optimizer: torch.optim.Optimizer,
    tracker: MemoryTracker,
    operations: Operations,
    microbatches: int,
) -> None:
    """What `Trainer._step` does with the device's memory."""
    job, world = step.job, step.world
    operations.clear()
    batches = []

    def next_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(microbatches):
            tracker.mark(f"microbatch {number + 1}")
            shape = (job.training.local_batch_size, job.training.seq_len)
            labels = world.local_labels(torch.zeros(shape, dtype=torch.int64))
            batches.append((torch.zeros(shape, dtype=torch.int64), labels))
            yield batches[-1]

    step._gradients(next_batches())
    operations.end_of_microbatches()
    tracker.mark("clipping")
    clip_gradients(step.model, job.training.max_norm, world.pipeline)
    tracker.mark("update")
    optimizer.step()
    quantization.after_optimizer_step(step.model, job.float8)
    tracker.mark("end")


@contextmanager
def _aside(tracker: MemoryTracker) -> Iterator[None]:
    """What is not this step's memory is not counted, and what FSDP2 gathers is known as that."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    def labelled(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with tracker.label(COMMUNICATION):
                return function(*args, **kwargs)

        return run

    def unseen(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with tracker.pause():
                return function(*args, **kwargs)

        return run

    def agreed(function: Any) -> Any:
        return lambda *args, **kwargs: SimpleNamespace(item=lambda: 1)

    changes = [
        (_fsdp_param_group, "foreach_all_gather", labelled),
        (_fsdp_param_group, "foreach_all_gather_copy_out", labelled),
        (_fsdp_param_group, "foreach_reduce", labelled),
        (_fsdp_param.FSDPParam, "init_all_gather_outputs", labelled),
        (_fsdp_param.FSDPParam, "init_unsharded_param", labelled),
        # Stages that do not exist cannot vote on whether shapes are fixed; ours are.
        (PipelineStage, "_warmup_forward_vote", agreed),
        (PipelineStage, "_warmup_backward_result", agreed),
        # Shapes of DTensors are found by running an operation on the whole tensors, without memory.
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
    ]
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in changes]
    try:
        for owner, name, change in changes:
            if hasattr(owner, name):
                setattr(owner, name, change(getattr(owner, name)))
        yield
    finally:
        for owner, name, function in before:
            if function is not None:
                setattr(owner, name, function)
