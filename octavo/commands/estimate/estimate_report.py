"""One job on so many GPUs: its trials, put together, as a table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from octavo.commands.estimate.layer_costs import alike, layers_of
from octavo.commands.estimate.operations import Message
from octavo.commands.estimate.peak_memory import PeakMemory, memory_of
from octavo.commands.estimate.step_time import StepTime, by_message, mfu, step_time
from octavo.commands.estimate.trial import Trial, prepared, run_trials
from octavo.config import JobConfig
from octavo.config.parallel_dims import KEYS, ParallelDims, parallel_dims_of
from octavo.config.pipeline_plan import PipelinePlan
from octavo.roofline import Gpu
from octavo.train import quantization

_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """What `octavo estimate` tells. rank: the process with the highest peak. time is of the slowest; None on
    a CPU.
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
        """Whether the peak fits into the device's memory; None on a CPU."""
        return None if self.gpu is None else self.memory.peak <= self.gpu.hbm_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Of each GPU."""
        return None if self.time is None else self.global_tokens / self.time.total / self.gpus

    @property
    def mfu(self) -> float | None:
        rate = self.tokens_per_second
        return None if rate is None or self.gpu is None else mfu(self.flops_per_token, rate, self.gpu)

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds, and plain numbers."""
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
    """Trace what can differ among the processes: one of each place in the pipeline that can be the worst.

    `ConfigError` as training would raise.
    """
    layout = parallel_dims_of(job.parallelism, gpus)
    _, plan = prepared(job)
    ranks = (
        [0] if plan is None else [gpus // layout.pipeline * place for place in telling(plan, same=alike(job))]
    )
    recipe = quantization.recipe_name(job.model.converters, job.float8)
    trials = run_trials(job, gpus, ranks, gpu)
    offload = job.training.enable_cpu_offload
    memories = {trial.rank: memory_of(trial.log, offload=offload) for trial in trials}
    worst: Trial = max(trials, key=lambda trial: memories[trial.rank].peak)
    times = [] if gpu is None else [step_time(trial, job, gpu, recipe) for trial in trials]
    one_pass = job.training.local_batch_size * layout.data
    return Estimate(
        gpu=gpu,
        gpus=gpus,
        layout=layout,
        rank=worst.rank,
        memory=memories[worst.rank],
        parameters=worst.parameters,
        all_parameters=worst.all_parameters,
        messages=by_message(worst),
        time=max(times, key=lambda time: time.total) if times else None,
        global_tokens=one_pass * worst.microbatches * job.training.seq_len,
        microbatches=worst.microbatches,
        flops_per_token=worst.flops_per_token,
        compiled=job.compile.enable,
    )


def telling(plan: PipelinePlan, *, same: bool) -> list[int]:
    """The places in a pipeline that can need most memory or time. `same`: layers are alike.

    The first place receives nothing, so it stands for itself alone. Where places have one stage each, an
    earlier one has no fewer microbatches in flight than a later one, so it stands for those that have no more
    in their stage. Where they have several, one of those between the first and the last stands for all if
    they have the same. Otherwise, and where a file has the schedule, all tell.
    """
    places = range(max(plan.process_of) + 1)
    contents = [[_content(plan.stages[stage]) for stage in plan.stages_of(place)] for place in places]
    if plan.csv is not None or not same:
        return list(places)
    if all(len(content) == 1 for content in contents):
        found = [0]
        for place in places[1:]:
            ((layers, others),) = contents[place]
            if not any(
                layers <= many and others <= more for earlier in found[1:] for many, more in contents[earlier]
            ):
                found.append(place)
        return found
    if any(content != contents[1] for content in contents[1:-1]):
        return list(places)
    return sorted({0, 1, places[-1]})


def _content(stage: Sequence[str]) -> tuple[int, frozenset[str]]:
    """How many layers a stage has, and what else."""
    layers = layers_of(stage)
    return len(layers), frozenset(stage).difference(layers)


_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "float8": "float8 buffers",
    "communication": "gathered, and messages",
}


def as_text(found: Estimate) -> str:
    """The table for a terminal."""
    axes = [f"{axis} {degree}" for axis, degree in found.layout.degrees.items() if degree > 1]
    device = "CPU" if found.gpu is None else found.gpu.name.upper()
    lines = [
        f"{found.gpus} x {device}: {', '.join(axes) or 'one process'}",
        f"parameters: {found.all_parameters:,}, of which {found.parameters:,} on process {found.rank}",
        "",
        f"memory of process {found.rank} at its peak ({found.memory.when})",
    ]
    lines += [f"  {_NAMES[kind]:<24}{size / _GB:10.3f} GB" for kind, size in found.memory.kinds.items()]
    total = f"  {'in all':<24}{found.memory.peak / _GB:10.3f} GB"
    if found.gpu is not None:
        verdict = "fits" if found.fits else "DOES NOT FIT"
        total += f"   {verdict} into {found.gpu.hbm_bytes / _GB:.0f} GB"
    lines.append(total)
    if found.memory.host:
        lines.append(f"  {'on the host':<24}{found.memory.host / _GB:10.3f} GB")
    if found.compiled:
        lines.append("  (layers are counted as in eager mode; compiled ones save less)")
    lines += ["", "sent by it in a step"]
    rows = [
        f"  {m.kind + ', ' + m.axis:<36}{sent / _GB:10.3f} GB   among {m.size}"
        for m, sent in sorted(found.messages.items(), key=lambda item: -item[1])
        if sent >= 1e5
    ]
    lines += rows or ["  nothing to speak of"]
    if found.time is not None:
        lines += ["", "a step on paper (every kernel at its ceiling; see docs/estimate.md)"]
        lines += [f"  {name:<24}{1e3 * value:10.1f} ms" for name, value in asdict(found.time).items()]
        lines.append(f"  {'in all':<24}{1e3 * found.time.total:10.1f} ms")
        rate = found.tokens_per_second
        assert rate is not None
        assert found.mfu is not None
        lines += [
            "",
            f"tokens/s: {rate:,.0f} a GPU, {rate * found.gpus:,.0f} in all; MFU {100 * found.mfu:.1f} %",
        ]
    return "\n".join(lines)
