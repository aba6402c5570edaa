"""The time of a step on paper, from what one process was seen to call and the roofline.

    compute     products after their shapes, attention, elementwise kernels, casts; recomputation included
    update      optimizer and clipping: bytes over bandwidth
    exposed     messages that compute does not hide

FSDP gathers the next layer's weights and reduces the last one's gradients while a layer computes: only what
takes longer than compute is exposed. Messages of tensor and context parallelism stand between two products
that wait for them: all exposed. A pipeline of p stages and m microbatches idles (p - 1) / m of the time that
it computes.

It is a model of a machine that does everything right: kernels at their ceilings, no stragglers, no hiccups
of the host, no power limit. See docs/estimate.md for how far published runs are from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.commands.estimate.operations import Counts, Message, sent
from octavo.commands.estimate.trial import Trial
from octavo.config import JobConfig
from octavo.config.parallel_dims import ParallelDims
from octavo.roofline import Block, Gpu, attention_seconds, cast_seconds, gemm_seconds
from octavo.roofline.casts import STREAM

_OVERLAPPED = ("shard", "shard x context", "replicate")
_LINK_SHARE, _NETWORK_SHARE = 0.75, 0.8
"""Of a link's data-sheet rate, what large collectives reach; E."""
_UPDATE_BYTES = 4 * 4 + 3 * 4 + 4 * 3
"""A parameter's update: reads weight, gradient and two moments, writes weight and moments; clipping reads the
gradient, then reads and writes it."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to."""

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
    """Whether the group of `message` has processes on more than one machine."""
    inner = 1
    for axis, degree in reversed(layout.degrees.items()):
        takes_part = axis in message.axis.split(" x ") or message.axis == "all"
        if takes_part and inner * message.size > gpu.in_a_machine:
            return True
        inner *= degree
    return False


def message_seconds(message: Message, payload: float, layout: ParallelDims, gpu: Gpu) -> float:
    """Seconds of messages of one kind and group with `payload` bytes in all."""
    bytes_sent = sent(message.kind, message.size, payload)
    if _spans_machines(message, layout, gpu):
        # A ring through all processes crosses machines once a machine: each network card carries one lane.
        return bytes_sent / (gpu.network * _NETWORK_SHARE)
    return bytes_sent / (gpu.link * _LINK_SHARE)


def _messages(counts: Counts, layout: ParallelDims, gpu: Gpu) -> tuple[float, float]:
    """Seconds of (messages that compute can hide, those it cannot)."""
    hidden = open_ = 0.0
    for message, payload in counts.messages.items():
        seconds = message_seconds(message, payload, layout, gpu)
        if message.axis in _OVERLAPPED:
            hidden += seconds
        else:
            open_ += seconds
    return hidden, open_


def _products(counts: Counts, gpu: Gpu) -> float:
    return sum(gemm_seconds(gpu, shape) * times for shape, times in counts.products.items())


def _attention(counts: Counts, gpu: Gpu) -> float:
    total = 0.0
    for (tokens, keys, width, causal, backward), times in counts.attention.items():
        total += attention_seconds(gpu, tokens, keys, width, causal=causal)[backward] * times
    return total


def block_of(args: object) -> Block | None:
    """The layer of a Llama with `args`; None for a model of another kind."""
    names = ("dim", "n_heads", "n_kv_heads", "hidden_dim", "head_dim")
    if not all(hasattr(args, name) for name in names):
        return None
    dim, heads, groups, hidden, head = (getattr(args, name) for name in names)
    return Block(dim, heads * head, groups * head, hidden)


def step_time(trial: Trial, job: JobConfig, gpu: Gpu, recipe: str | None) -> StepTime:
    """The step of the process that `trial` traced; 0 for elementwise work of models other than Llama."""
    layout, times = trial.layout, trial.microbatches / trial.traced
    counts = trial.microbatch
    products = _products(counts, gpu) * times
    attention = _attention(counts, gpu) * times
    elementwise, casts = _elementwise(trial, job, gpu, recipe)
    hidden, open_ = (seconds * times for seconds in _messages(counts, layout, gpu))
    compute = products + attention + elementwise + casts
    schedule = job.training.local_batch_size // job.parallelism.pipeline_parallel_microbatch_size
    bubble = 0.0
    if layout.pipeline > 1:
        bubble = (compute + open_) * (layout.pipeline - 1) / (schedule * trial.stages / layout.pipeline)
    return StepTime(
        products=products,
        attention=attention,
        elementwise=elementwise,
        casts=casts,
        update=trial.parameters * _UPDATE_BYTES / (gpu.hbm * STREAM),
        exposed=open_ + max(0.0, hidden - compute),
        bubble=bubble,
    )


def _elementwise(trial: Trial, job: JobConfig, gpu: Gpu, recipe: str | None) -> tuple[float, float]:
    """Seconds of (elementwise kernels, casts) of this process's layers in one step."""
    block, layout = block_of(trial.args), trial.layout
    if block is None:
        return 0.0, 0.0
    tokens = job.training.local_batch_size * job.training.seq_len / (layout.context * layout.tensor)
    layers = trial.args.n_layers / layout.pipeline
    forward, backward = block.elementwise_bytes(round(tokens))
    if job.activation_checkpoint.mode != "none":
        backward += forward
    vocabulary = 0.0
    if trial.args.vocab_size:  # logits: float32 copies of them, forward and backward, on the last stage
        vocabulary = 16.0 * tokens * trial.args.vocab_size / layout.pipeline
    bytes_ = (layers * (forward + backward) + vocabulary) * trial.microbatches
    seconds = bytes_ / (gpu.hbm * STREAM)
    if recipe is None or gpu.float8 is None:
        return seconds, 0.0
    tensors = block.cast_tensors(round(tokens))
    made = cast_seconds(gpu, tensors, recipe, "kernels", microbatches=trial.microbatches)
    return seconds, made * layers * trial.microbatches


def mfu(flops_per_token: float, tokens_per_second: float, gpu: Gpu) -> float:
    """Share of the GPU's dense bfloat16 peak, as the trainer reports it."""
    return flops_per_token * tokens_per_second / gpu.bf16


def by_message(trial: Trial) -> Mapping[Message, float]:
    """Bytes that this process sends in a step, by kind and axis."""
    times = trial.microbatches / trial.traced
    found: dict[Message, float] = {}
    for counts, factor in ((trial.microbatch, times), (trial.rest, 1.0)):
        for message, payload in counts.messages.items():
            bytes_sent = sent(message.kind, message.size, payload) * factor
            found[message] = found.get(message, 0.0) + bytes_sent
    return found
