"""Predicts the time of a step from a rank's traced operations and the roofline model.

    compute     matrix products, attention, elementwise kernels, casts; recomputation included
    update      optimizer and clipping: bytes over bandwidth
    exposed     communication that does not overlap with compute

FSDP gathers the next layer's weights and reduces the previous layer's gradients while a layer computes, so
only what takes longer than compute is exposed. Products wait for the messages of tensor and context
parallelism, so all of these are exposed. A pipeline of p stages and m microbatches idles (p - 1) / m of the
time that it computes.

The model assumes an ideal machine: kernels at their ceilings, no stragglers, no host overhead, no power
limit. docs/estimate.md compares it with published runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.commands.estimate.operations import Counts, Message
from octavo.commands.estimate.rank_trace import RankTrace
from octavo.config import JobConfig
from octavo.config.parallel_dims import ParallelDims
from octavo.roofline import Block, Gpu, attention_seconds, cast_seconds, gemm_seconds
from octavo.roofline.casts import STREAM

_OVERLAPPED = ("shard", "shard x context", "replicate")
_LINK_SHARE, _NETWORK_SHARE = 0.75, 0.8
"""Share of a link's data-sheet rate that large collectives reach (an estimate)."""
_UPDATE_BYTES = 4 * 4 + 3 * 4 + 4 * 3
"""Per parameter: the update reads weight, gradient and two moments and writes weight and moments; clipping
reads the gradient, then reads and writes it."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by use."""

    products: float
    attention: float
    elementwise: float
    casts: float
    update: float
    exposed: float
    bubble: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def _spans_machines(message: Message, layout: ParallelDims, gpu: Gpu) -> bool:
    """Whether the process group of `message` includes more than one machine."""
    inner = 1
    for axis, degree in reversed(layout.degrees.items()):
        in_group = axis in message.axis.split(" x ") or message.axis == "all"
        if in_group and inner * message.size > gpu.in_a_machine:
            return True
        inner *= degree
    return False


def message_seconds(message: Message, payload: float, layout: ParallelDims, gpu: Gpu) -> float:
    """Seconds of messages of one kind and group with `payload` bytes in total."""
    size = message.bytes_sent(payload)
    if _spans_machines(message, layout, gpu):
        # A ring crosses machines once per machine, so each network card carries one lane.
        return size / (gpu.network * _NETWORK_SHARE)
    return size / (gpu.link * _LINK_SHARE)


def _message_seconds(counts: Counts, layout: ParallelDims, gpu: Gpu) -> tuple[float, float]:
    """Seconds of messages that (can, cannot) overlap with compute."""
    overlapped = exposed = 0.0
    for message, payload in counts.messages.items():
        seconds = message_seconds(message, payload, layout, gpu)
        if message.axis in _OVERLAPPED:
            overlapped += seconds
        else:
            exposed += seconds
    return overlapped, exposed


def _product_seconds(counts: Counts, gpu: Gpu) -> float:
    return sum(gemm_seconds(gpu, shape) * times for shape, times in counts.products.items())


def _attention_seconds(counts: Counts, gpu: Gpu) -> float:
    total = 0.0
    for (tokens, keys, width, causal, backward), times in counts.attention.items():
        total += attention_seconds(gpu, tokens, keys, width, causal=causal)[backward] * times
    return total


def _llama_block(args: object) -> Block | None:
    """The layer of a Llama with `args`; None for a model of another kind."""
    fields = ("dim", "n_heads", "n_kv_heads", "hidden_dim", "head_width")
    other = getattr(args, "moe", None) or getattr(args, "latent", None)
    if other or not all(hasattr(args, name) for name in fields):
        return None
    dim, heads, groups, hidden, head = (getattr(args, name) for name in fields)
    return Block(dim, heads * head, groups * head, hidden)


def step_time(trace: RankTrace, job: JobConfig, gpu: Gpu, recipe: str | None) -> StepTime:
    """Predict the step of a traced rank. Elementwise kernels and casts are 0 for models other than Llama."""
    layout, times = trace.layout, trace.microbatches / trace.traced
    products = _product_seconds(trace.microbatch, gpu) * times
    attention = _attention_seconds(trace.microbatch, gpu) * times
    elementwise, casts = _elementwise_seconds(trace, job, gpu, recipe)
    overlapped, exposed = (s * times for s in _message_seconds(trace.microbatch, layout, gpu))
    compute = products + attention + elementwise + casts
    schedule = job.training.local_batch_size // job.parallelism.pipeline_parallel_microbatch_size
    bubble = 0.0
    if layout.pipeline > 1:
        bubble = (compute + exposed) * (layout.pipeline - 1) / (schedule * trace.stages / layout.pipeline)
    return StepTime(
        products=products,
        attention=attention,
        elementwise=elementwise,
        casts=casts,
        update=trace.parameters * _UPDATE_BYTES / (gpu.hbm * STREAM),
        exposed=exposed + max(0.0, overlapped - compute),
        bubble=bubble,
    )


def _elementwise_seconds(
    trace: RankTrace, job: JobConfig, gpu: Gpu, recipe: str | None
) -> tuple[float, float]:
    """Seconds of (elementwise kernels, casts) of this rank's layers per step."""
    block, layout = _llama_block(trace.args), trace.layout
    if block is None:
        return 0.0, 0.0
    tokens = job.training.local_batch_size * job.training.seq_len / (layout.context * layout.tensor)
    layers = trace.args.n_layers / layout.pipeline
    forward, backward = block.elementwise_bytes(round(tokens))
    if job.activation_checkpoint.mode != "none":
        backward += forward
    vocabulary = 0.0
    if trace.args.vocab_size:  # float32 copies of the logits, forward and backward, on the last stage
        vocabulary = 16.0 * tokens * trace.args.vocab_size / layout.pipeline
    moved = (layers * (forward + backward) + vocabulary) * trace.microbatches
    seconds = moved / (gpu.hbm * STREAM)
    if recipe is None or gpu.float8 is None:
        return seconds, 0.0
    tensors = block.cast_tensors(round(tokens))
    casts = cast_seconds(gpu, tensors, recipe, "kernels", microbatches=trace.microbatches)
    return seconds, casts * layers * trace.microbatches


def mfu(flops_per_token: float, tokens_per_second: float, gpu: Gpu) -> float:
    """Model FLOPs utilization: the share of the GPU's dense bfloat16 peak, as the trainer reports it."""
    return flops_per_token * tokens_per_second / gpu.bf16


def bytes_by_message(trace: RankTrace) -> Mapping[Message, float]:
    """Bytes that this rank sends per step, by message."""
    times = trace.microbatches / trace.traced
    total: dict[Message, float] = {}
    for counts, factor in ((trace.microbatch, times), (trace.rest, 1.0)):
        for message, payload in counts.messages.items():
            total[message] = total.get(message, 0.0) + message.bytes_sent(payload) * factor
    return total
