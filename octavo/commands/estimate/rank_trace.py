"""Traces a training step of one rank of a job, of any number of processes, on fake tensors.

The process group is fake: collectives return at once and transfer nothing. Everything else is the trainer's
own code: mesh, conversion, parallelisation, optimizer and the step. So layouts, float8, checkpointing and
sharding are the real ones. Layers run eagerly even if the job compiles them (see docs/estimate.md).

When a GPU is estimated the tensors are still CPU tensors, because a CPU build of PyTorch has no others. The
differences of a GPU are simulated: bfloat16, float8 products in hardware, and casts by kernels, which need no
scratch memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo import models
from octavo.commands.estimate.forked_workers import run_forked
from octavo.commands.estimate.layer_extrapolation import (
    ManyLayersLog,
    extrapolate_layers,
    layers_to_skip,
    mark_layers,
    skip_layers,
)
from octavo.commands.estimate.memory_tracker import (
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    Log,
    MemoryTracker,
    label_hidden_memory,
)
from octavo.commands.estimate.microbatch_extrapolation import (
    ManyMicrobatchesLog,
    NotLinear,
    ShortSchedule,
    extrapolate_microbatches,
    run_short_schedule,
    short_schedule,
)
from octavo.commands.estimate.operations import Counts, Message, OperationCounter
from octavo.config import ConfigError, JobConfig, names
from octavo.config.parallel_dims import ParallelDims, parallel_dims_of
from octavo.distributed import mesh
from octavo.metrics.device import choose_param_dtype
from octavo.optim.optimizer import build_optimizer, clip_gradients
from octavo.preflight.pipeline_plan import PipelinePlan
from octavo.roofline import Gpu
from octavo.tokenizer import build_tokenizer
from octavo.train import quantization
from octavo.train.build_model import build_model, model_args, pipeline_plan
from octavo.train.step import TrainStep, build_train_step, global_batch_size

_TRACED_MICROBATCHES = 2
"""The second one adds to existing gradients; further ones do not change the peak."""


@dataclass(frozen=True)
class RankTrace:
    """The traced step of one rank.

    log: its allocations. microbatch, rest: products, attention and messages of the traced microbatches, and
    of the rest of the step. parameters: of this rank; all_parameters: of the model. microbatches: per step;
    traced: how many of them were traced. stages: of the whole pipeline.
    """

    rank: int
    layout: ParallelDims
    log: Log | ManyMicrobatchesLog | ManyLayersLog
    microbatch: Counts
    rest: Counts
    parameters: int
    all_parameters: int
    flops_per_token: float
    microbatches: int
    args: Any
    stages: int
    traced: int


@dataclass(frozen=True)
class ShortTrace:
    """A rank's step, traced with some of the model's layers: log, counts, and parameters of this rank."""

    log: Log | ManyMicrobatchesLog
    microbatch: Counts
    rest: Counts
    parameters: int


def trace_ranks(job: JobConfig, size: int, ranks: Sequence[int], gpu: Gpu | None = None) -> list[RankTrace]:
    """Trace `ranks` of `size` processes on `gpu`, or on this CPU (None), in forked workers.

    Raises:
        ConfigError: as training would.
    """
    skipped = _skipped_layers(job)
    calls = [{"rank": rank, "gpu": gpu, "skipped": count} for rank in ranks for count in skipped]
    traces: list[ShortTrace] = run_forked(_trace_short, (job, size), calls)
    each = len(skipped)
    return [
        _extrapolate(job, size, rank, skipped[0], traces[each * number : each * (number + 1)])
        for number, rank in enumerate(ranks)
    ]


def trace_rank(
    job: JobConfig, size: int, *, rank: int = 0, gpu: Gpu | None = None, whole: bool = False
) -> RankTrace:
    """Trace `rank` in this process. `whole`: trace all layers and microbatches, without extrapolation."""
    skipped = (0,) if whole else _skipped_layers(job)
    traces = [_trace_short(job, size, rank=rank, gpu=gpu, skipped=count, whole=whole) for count in skipped]
    return _extrapolate(job, size, rank, skipped[0], traces)


def prepare_model(job: JobConfig) -> tuple[Any, PipelinePlan | None]:
    """Return the model's arguments and its pipeline plan."""
    models.import_custom(job.experimental.custom_import, job.model.name)
    args = model_args(job, _tokenizer(job))
    return args, pipeline_plan(job, args)


def _tokenizer(job: JobConfig) -> Any:
    """The job's tokenizer; if it is not downloaded, a stand-in with the model's own vocabulary size."""
    path = job.model.hf_assets_path
    if path in names.TOKENIZERS or Path(path).expanduser().exists():
        return build_tokenizer(path)
    vocabulary = getattr(models.get(job.model.name).args(job.model.flavor, job.model.args), "vocab_size", 0)
    if not vocabulary:
        raise ConfigError(
            f"model.hf_assets_path = {path!r}: no such tokenizer, and {job.model.flavor} takes its "
            "vocabulary from it"
        )
    return SimpleNamespace(vocab_size=vocabulary, eos_id=vocabulary - 1, bos_id=0)


def _skipped_layers(job: JobConfig) -> tuple[int, ...]:
    """For each of the one or two traces of a rank: how many layers it skips in each stage."""
    skipped = layers_to_skip(job, *prepare_model(job))
    return (skipped, skipped - 1) if skipped else (0,)


def _extrapolate(
    job: JobConfig, size: int, rank: int, skipped: int, traces: Sequence[ShortTrace]
) -> RankTrace:
    """Combine the traces of a rank: a whole one, or two without `skipped` and `skipped` - 1 layers."""
    args, plan = prepare_model(job)
    spec = models.get(job.model.name)
    with torch.device("meta"):
        model = spec.build(args)
    microbatches, traced = _microbatches(job, size)
    short, long = traces[0], traces[-1]
    return RankTrace(
        rank=rank,
        layout=parallel_dims_of(job.parallelism, size),
        log=ManyLayersLog(short.log, long.log, skipped) if skipped else short.log,
        microbatch=extrapolate_layers(short.microbatch, long.microbatch, skipped),
        rest=extrapolate_layers(short.rest, long.rest, skipped),
        parameters=short.parameters + skipped * (long.parameters - short.parameters),
        all_parameters=sum(p.numel() for p in model.parameters()),
        flops_per_token=spec.flops_per_token(args, model, job.training.seq_len),
        microbatches=microbatches,
        args=args,
        stages=1 if plan is None else len(plan.stages),
        traced=traced,
    )


def _microbatches(job: JobConfig, size: int) -> tuple[int, int]:
    """(local batches per step, how many of them are traced)."""
    layout = parallel_dims_of(job.parallelism, size)
    one_pass = job.training.local_batch_size * layout.data
    microbatches = global_batch_size(job.training, layout) // one_pass
    return microbatches, min(microbatches, _TRACED_MICROBATCHES)


@contextmanager
def _fake_process_group(rank: int, size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _trace_short(
    job: JobConfig, size: int, *, rank: int, gpu: Gpu | None, skipped: int = 0, whole: bool = False
) -> ShortTrace:
    """Trace `rank` of `size` without `skipped` layers per stage and, unless `whole`, with a short schedule if
    the rank is in a pipeline.
    """
    args, plan = prepare_model(job)
    job = _as_eager(job)
    layout = parallel_dims_of(job.parallelism, size)
    with _fake_process_group(rank, size), ExitStack() as scopes:
        if gpu:
            scopes.enter_context(quantization.simulate_gpu(gpu.capability))
        device = torch.device("cpu")
        world = mesh.build_world(device, layout, loss_parallel=not job.parallelism.disable_loss_parallel)
        pipeline_rank = 0 if world.pipeline is None else world.pipeline.get_local_rank()
        short = None if plan is None or whole else short_schedule(plan, pipeline_rank)
        short_args, short_plan = skip_layers(args, plan, skipped)
        try:
            trace = _trace_step(job, short_args, short_plan, world, gpu, short)
        except NotLinear:
            trace = _trace_step(job, short_args, short_plan, world, gpu, None)
        if plan is not None:
            message = Message("send", "pipeline", layout.pipeline)
            _, traced = _microbatches(job, size)
            trace.microbatch.messages[message] += traced * _pipeline_bytes(
                job, plan, pipeline_rank, layout, args, bool(gpu)
            )
    return trace


def _as_eager(job: JobConfig) -> JobConfig:
    """`job` without compilation or CPU offloading; offloaded memory is subtracted from the log later."""
    changed = replace(
        job,
        compile=replace(job.compile, enable=False),
        training=replace(job.training, enable_cpu_offload=False),
    )
    changed.given, changed.where = job.given, job.where
    return changed


def _pipeline_bytes(
    job: JobConfig, plan: PipelinePlan, rank: int, layout: ParallelDims, args: Any, on_gpu: bool
) -> int:
    """Bytes of activations and their gradients that pipeline rank `rank` sends in one local batch; the traced
    operations do not include these.
    """
    pipeline = models.get(job.model.name).pipeline
    assert pipeline is not None
    dtype = choose_param_dtype(job.training.mixed_precision_param, torch.device("cuda" if on_gpu else "cpu"))
    stages, last = plan.stages_of(rank), len(plan.stages) - 1
    forward = sum(stage < last and plan.process_of[stage + 1] != rank for stage in stages)
    backward = sum(stage > 0 and plan.process_of[stage - 1] != rank for stage in stages)
    positions = job.training.local_batch_size * job.training.seq_len // (layout.context * layout.tensor)
    return (forward + backward) * positions * pipeline.width(args) * dtype.itemsize


def _trace_step(
    job: JobConfig,
    args: Any,
    plan: PipelinePlan | None,
    world: mesh.World,
    gpu: Gpu | None,
    short: ShortSchedule | None,
) -> ShortTrace:
    """Trace a step of the model with `args`, or of this rank's pipeline stages with the schedule `short`."""
    device = torch.device("cpu")
    dtype = choose_param_dtype(job.training.mixed_precision_param, torch.device("cuda" if gpu else "cpu"))
    recipe = quantization.recipe_name(job.model.converters, job.float8)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    operations = OperationCounter(world.layout)

    def materialise(part: nn.Module) -> None:
        if gpu:
            quantization.force_hardware_path(part)
        with fake:
            part.to_empty(device=device)

    built = build_model(
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
    parts = built.stages or [built.model]
    tracker = MemoryTracker(fake, operations.record)
    mark_layers(parts, tracker)
    with fake:
        for part in parts:
            quantization.gather_in_float8(part)
    with label_hidden_memory(tracker), fake:
        step = build_train_step(job, built, plan=plan, world=world, device=device)
        # Microbatches are traced one by one; to count their labels, a step reads them all at once.
        step = replace(step, microbatches=min(step.microbatches, _TRACED_MICROBATCHES), counts_labels=False)
        if short is not None:
            run_short_schedule(step.pipeline, short, tracker, operations.begin_action)
        optimizer = build_optimizer(built.model, job.optimizer)
        parameters = list(built.model.parameters())
        with tracker:
            tracker.claim([*parameters, *built.model.buffers()], PARAMETERS)
            _first_update(parameters, optimizer)
            tracker.claim([v for state in optimizer.state.values() for v in state.values()], OPTIMIZER)
            _run_step(job, step, optimizer, tracker, operations)
            tracker.claim([p.grad for p in parameters if p.grad is not None], GRADIENTS)
    log: Log | ManyMicrobatchesLog = tracker.log
    counts = operations.microbatches
    if short is not None:
        log = ManyMicrobatchesLog(tracker.log, short)
        log.peaks()  # raises `NotLinear` now rather than in the parent process
        counts = extrapolate_microbatches(counts, operations.by_action, short)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return ShortTrace(log, counts, operations.rest, sum(p.numel() for p in local))


def _first_update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Update once without a forward pass, which creates the optimizer's states."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _run_step(
    job: JobConfig,
    step: TrainStep,
    optimizer: torch.optim.Optimizer,
    tracker: MemoryTracker,
    operations: OperationCounter,
) -> None:
    """Run the part of the trainer's step that uses device memory."""
    operations.clear()
    batches = []  # kept alive, as a step's batches are

    def next_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(step.microbatches):
            tracker.mark(f"microbatch {number + 1}")
            shape = (job.training.local_batch_size, job.training.seq_len)
            labels = step.world.local_labels(torch.zeros(shape, dtype=torch.int64))
            batches.append((torch.zeros(shape, dtype=torch.int64), labels))
            yield batches[-1]

    step.gradients(next_batches())
    operations.end_of_microbatches()
    tracker.mark("clipping")
    clip_gradients(step.model, job.training.max_norm, step.world.pipeline)
    tracker.mark("update")
    optimizer.step()
    quantization.after_optimizer_step(step.model, job.float8)
    tracker.mark("end")
