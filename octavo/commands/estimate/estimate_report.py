"""Combines the traces of a job's ranks into an estimate, and prints it as a table or as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from octavo.commands.estimate.layer_extrapolation import layers_are_alike, layers_of
from octavo.commands.estimate.operations import Message
from octavo.commands.estimate.peak_memory import PeakMemory, peak_memory
from octavo.commands.estimate.rank_trace import RankTrace, prepare_model, trace_ranks
from octavo.commands.estimate.step_time import StepTime, bytes_by_message, mfu, step_time
from octavo.config import JobConfig
from octavo.config.parallel_dims import KEYS, ParallelDims, parallel_dims_of
from octavo.preflight.pipeline_plan import PipelinePlan
from octavo.roofline import Gpu
from octavo.train import quantization

_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """The result of `octavo estimate`. memory, parameters and messages are those of `rank`, which has the
    highest peak; time is that of the slowest rank, None on a CPU.
    """

    gpu: Gpu | None
    gpus: int
    layout: ParallelDims
    rank: int
    memory: PeakMemory
    parameters: int
    all_parameters: int
    messages: Mapping[Message, float]
    time: StepTime | None
    global_tokens: int
    microbatches: int
    flops_per_token: float
    compiled: bool

    @property
    def fits(self) -> bool | None:
        return None if self.gpu is None else self.memory.peak <= self.gpu.hbm_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second and GPU."""
        return None if self.time is None else self.global_tokens / self.time.total / self.gpus

    @property
    def mfu(self) -> float | None:
        rate = self.tokens_per_second
        return None if rate is None or self.gpu is None else mfu(self.flops_per_token, rate, self.gpu)

    def as_json(self) -> dict[str, Any]:
        return {
            "device": "cpu" if self.gpu is None else self.gpu.name,
            "gpus": self.gpus,
            "layout": {KEYS[axis]: degree for axis, degree in self.layout.degrees.items()},
            "rank": self.rank,
            "parameters": self.all_parameters,
            "parameters_per_rank": self.parameters,
            "peak_bytes": self.memory.peak,
            "peak_at": self.memory.when,
            "memory_bytes": dict(self.memory.kinds),
            "host_bytes": self.memory.host,
            "device_bytes": None if self.gpu is None else self.gpu.hbm_bytes,
            "fits": self.fits,
            "sent_bytes_per_step": [
                {"kind": m.kind, "axis": m.axis, "processes": m.size, "bytes": round(sent)}
                for m, sent in self.messages.items()
            ],
            "microbatches": self.microbatches,
            "global_tokens": self.global_tokens,
            "step_seconds": None if self.time is None else self.time.total,
            "step_seconds_by": None if self.time is None else asdict(self.time),
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "mfu": self.mfu,
            "compiled_layers_modelled_as_eager": self.compiled,
        }


def estimate(job: JobConfig, gpus: int, gpu: Gpu | None) -> Estimate:
    """Trace one rank of each pipeline rank that can have the highest peak or the longest step.

    Raises:
        ConfigError: as training would.
    """
    layout = parallel_dims_of(job.parallelism, gpus)
    _, plan = prepare_model(job)
    ranks = [0]
    if plan is not None:
        in_pipeline = pipeline_ranks_to_trace(plan, alike=layers_are_alike(job))
        ranks = [gpus // layout.pipeline * rank for rank in in_pipeline]
    recipe = quantization.recipe_name(job.model.converters, job.float8)
    traces = trace_ranks(job, gpus, ranks, gpu)
    offload = job.training.enable_cpu_offload
    memories = {trace.rank: peak_memory(trace.log, offload=offload) for trace in traces}
    worst: RankTrace = max(traces, key=lambda trace: memories[trace.rank].peak)
    times = [] if gpu is None else [step_time(trace, job, gpu, recipe) for trace in traces]
    one_pass = job.training.local_batch_size * layout.data
    return Estimate(
        gpu=gpu,
        gpus=gpus,
        layout=layout,
        rank=worst.rank,
        memory=memories[worst.rank],
        parameters=worst.parameters,
        all_parameters=worst.all_parameters,
        messages=bytes_by_message(worst),
        time=max(times, key=lambda time: time.total) if times else None,
        global_tokens=one_pass * worst.microbatches * job.training.seq_len,
        microbatches=worst.microbatches,
        flops_per_token=worst.flops_per_token,
        compiled=job.compile.enable,
    )


def pipeline_ranks_to_trace(plan: PipelinePlan, *, alike: bool) -> list[int]:
    """Return the pipeline ranks that can need the most memory or time. `alike`: all layers are alike.

    The first rank receives nothing, so it represents only itself. If each rank has one stage, an earlier rank
    has at least as many microbatches in flight as a later one, so it represents later ranks whose stage has
    no more layers or other modules. If ranks have several stages, one rank between the first and the last
    represents all of those with the same contents. Otherwise, or if a file gives the schedule, all are
    traced.
    """
    ranks = range(max(plan.process_of) + 1)
    contents = [[_content(plan.stages[stage]) for stage in plan.stages_of(rank)] for rank in ranks]
    if plan.csv is not None or not alike:
        return list(ranks)
    if all(len(content) == 1 for content in contents):
        selected = [0]
        for rank in ranks[1:]:
            ((layers, others),) = contents[rank]
            if not any(
                layers <= many and others <= more
                for earlier in selected[1:]
                for many, more in contents[earlier]
            ):
                selected.append(rank)
        return selected
    if any(content != contents[1] for content in contents[1:-1]):
        return list(ranks)
    return sorted({0, 1, ranks[-1]})


def _content(stage: Sequence[str]) -> tuple[int, frozenset[str]]:
    """(number of layers in a stage, its other modules)."""
    layers = layers_of(stage)
    return len(layers), frozenset(stage).difference(layers)


_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "float8": "float8 buffers",
    "communication": "communication",
}


def as_text(result: Estimate) -> str:
    """The estimate as a table for a terminal."""
    axes = [f"{axis} {degree}" for axis, degree in result.layout.degrees.items() if degree > 1]
    device = "CPU" if result.gpu is None else result.gpu.name.upper()
    lines = [
        f"{result.gpus} x {device}: {', '.join(axes) or 'one process'}",
        f"parameters: {result.all_parameters:,}, of which {result.parameters:,} on process {result.rank}",
        "",
        f"memory of process {result.rank} at its peak ({result.memory.when})",
    ]
    lines += [f"  {_NAMES[kind]:<24}{size / _GB:10.3f} GB" for kind, size in result.memory.kinds.items()]
    total = f"  {'total':<24}{result.memory.peak / _GB:10.3f} GB"
    if result.gpu is not None:
        verdict = "fits" if result.fits else "DOES NOT FIT"
        total += f"   {verdict} into {result.gpu.hbm_bytes / _GB:.0f} GB"
    lines.append(total)
    if result.memory.host:
        lines.append(f"  {'on the host':<24}{result.memory.host / _GB:10.3f} GB")
    if result.compiled:
        lines.append("  (layers are counted as in eager mode; compiled layers save less)")
    lines += ["", "sent by this process per step"]
    messages = sorted(result.messages.items(), key=lambda item: -item[1])
    rows = [
        f"  {m.kind + ', ' + m.axis:<36}{size / _GB:10.3f} GB   among {m.size}"
        for m, size in messages
        if size >= 1e5
    ]
    lines += rows or ["  less than 0.1 MB"]
    if result.time is not None:
        rate, share = result.tokens_per_second, result.mfu
        assert rate is not None
        assert share is not None
        lines += ["", "predicted step time (every kernel at its ceiling; see docs/estimate.md)"]
        lines += [f"  {name:<24}{1e3 * value:10.1f} ms" for name, value in asdict(result.time).items()]
        lines.append(f"  {'total':<24}{1e3 * result.time.total:10.1f} ms")
        rates = f"tokens/s: {rate:,.0f} per GPU, {rate * result.gpus:,.0f} in total; MFU {100 * share:.1f} %"
        lines += ["", rates]
    return "\n".join(lines)
