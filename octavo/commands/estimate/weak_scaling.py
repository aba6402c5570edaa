"""Predicts tokens/s and MFU of Llama models on 8 to 4096 GPUs, each with the fastest layout that fits.

Tracing a layout takes seconds to a minute, so the search uses formulas with the same roofline model: sharded
parameters, gradients and moments; activations of the layers in flight; gathered weights; logits. The formulas
leave MARGIN of the memory free, because traced eager layers hold up to a quarter more. `octavo estimate` on
the chosen layout is exact.

Fixed: 8192 tokens per sequence, and at most 2048 sequences per step (16 M tokens, as in the Llama 3 paper's
training, arXiv:2407.21783).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from octavo.commands.estimate.operations import Message
from octavo.commands.estimate.step_time import message_seconds, mfu
from octavo.config.parallel_dims import ParallelDims
from octavo.families import ModelArgs
from octavo.families.llama3 import FAMILY
from octavo.roofline import Block, Gpu, Shape, attention_seconds, cast_seconds, gemm_seconds, linear_shapes
from octavo.roofline.casts import STREAM

SIZES = ("8B", "70B", "405B")
COUNTS = tuple(8 * 2**n for n in range(10))
SEQ_LEN = 8192
MAX_SEQUENCES = 2048
MARGIN = 0.25
_RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}
"""Activation checkpointing mode -> share of forward's products that backward recomputes."""


@dataclass(frozen=True)
class ScalingChoice:
    """A layout and its prediction. batch: sequences per microbatch; microbatches: per step."""

    model: str
    gpus: int
    recipe: str | None
    layout: ParallelDims
    checkpoint: str
    batch: int
    microbatches: int
    peak_bytes: float
    tokens_per_second: float
    mfu: float


def _layouts(args: ModelArgs, gpus: int) -> Iterator[ParallelDims]:
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            rest, left = divmod(gpus, tensor * pipeline)
            if left or rest < 1 or args.n_kv_heads % tensor or pipeline > args.n_layers // 2:
                continue
            for shard in {rest, min(rest, 8), min(rest, 64), min(rest, 256)}:
                if rest % shard == 0:
                    yield ParallelDims(pipeline=pipeline, replicate=rest // shard, shard=shard, tensor=tensor)


def _parameters(args: ModelArgs, block: Block) -> tuple[float, float]:
    """Parameters of (one layer, embedding and head together)."""
    return block.weights + 2.0 * args.dim, 2.0 * args.vocab_size * args.dim + args.dim


def _peak(
    args: ModelArgs, block: Block, layout: ParallelDims, checkpoint: str, batch: int, in_flight: int
) -> float:
    """Bytes of the rank with the highest peak; in_flight: microbatches whose activations are held."""
    layer, ends = _parameters(args, block)
    layers = math.ceil(args.n_layers / layout.pipeline)
    local = (layers * layer + ends / (1 if layout.pipeline == 1 else 2)) / (layout.shard * layout.tensor)
    tokens = batch * SEQ_LEN / layout.tensor
    saved = block.saved(round(tokens))["all"]
    per_layer = {
        "none": saved,
        "selective": 0.5 * saved,  # half of the products, attention, and the layer's input
        "full": 2.0 * tokens * args.dim,
    }[checkpoint]
    recomputed = saved if checkpoint != "none" else 0.0
    gathered = 2 * 2 * layer / layout.tensor
    if layout.pipeline > 1:  # weights stay gathered over a step's microbatches, and gradients unreduced
        gathered = (2 + 4) * layers * layer / layout.tensor
    head = 2 * args.vocab_size * args.dim / layout.tensor
    logits = (2 + 4 + 4) * tokens * args.vocab_size / layout.pipeline**0.5
    at_loss = layers * per_layer * in_flight + max(logits, recomputed) + gathered + head
    return 16.0 * local + at_loss


def _seconds(
    args: ModelArgs,
    block: Block,
    layout: ParallelDims,
    gpu: Gpu,
    recipe: str | None,
    checkpoint: str,
    batch: int,
    microbatches: int,
) -> float:
    """Seconds per step."""
    tokens, split = batch * SEQ_LEN, layout.tensor
    products = 0.0
    for name, (inputs, outputs) in block.linears.items():
        row_wise = name in ("wo", "w2")  # tensor parallelism splits the contraction
        k, n = (inputs // split, outputs) if row_wise else (inputs, outputs // split)
        for product, shape in linear_shapes(tokens, k, n, float8=recipe is not None).items():
            times = 1 + (_RECOMPUTED[checkpoint] if product == "output" else 0.0)
            products += times * gemm_seconds(gpu, shape)
    forward, backward = attention_seconds(gpu, tokens, SEQ_LEN, block.queries // split)
    if checkpoint == "full":
        backward += forward
    first, second = block.elementwise_bytes(round(tokens / split))
    moved = first + second + (first if checkpoint != "none" else 0.0)
    casts = 0.0
    if recipe is not None:
        tensors = block.cast_tensors(round(tokens / split))
        casts = cast_seconds(gpu, tensors, recipe, "kernels", microbatches=microbatches)
    compute = products + forward + backward + moved / (gpu.hbm * STREAM) + casts
    per_layer = compute + _tensor_parallel_seconds(args, layout, gpu, tokens, recomputed=checkpoint == "full")
    layers = args.n_layers / layout.pipeline
    head = 3 * gemm_seconds(gpu, Shape(tokens, args.dim, args.vocab_size // split))
    head += 16.0 * tokens * args.vocab_size / split / (gpu.hbm * STREAM)
    busy = (layers * per_layer + head) * microbatches
    bubble = (layout.pipeline - 1) * (layers * per_layer + head)

    layer, ends = _parameters(args, block)
    weights = (layers * layer + ends / layout.pipeline) / split
    local = weights / layout.shard
    gathers = (2 if layout.pipeline == 1 else 1 / microbatches) * microbatches
    gather = Message("all-gather", "shard", layout.shard)
    traffic = message_seconds(gather, 2 * weights, layout, gpu) * gathers
    reductions = microbatches if layout.pipeline == 1 else 1
    scatter = Message("reduce-scatter", "shard", layout.shard)
    traffic += message_seconds(scatter, 4 * weights, layout, gpu) * reductions
    if layout.replicate > 1:
        over = Message("all-reduce", "replicate", layout.replicate)
        traffic += message_seconds(over, 4 * local, layout, gpu) * reductions
    update = 40 * local / (gpu.hbm * STREAM)
    return busy + bubble + max(0.0, traffic - busy) + update


def _tensor_parallel_seconds(
    args: ModelArgs, layout: ParallelDims, gpu: Gpu, tokens: int, *, recomputed: bool
) -> float:
    """Seconds of a layer's tensor-parallel messages: two gathers and scatters per forward and backward."""
    if layout.tensor == 1:
        return 0.0
    times = 8 + (4 if recomputed else 0)
    message = Message("all-gather", "tensor", layout.tensor)
    return times * message_seconds(message, 2.0 * tokens * args.dim, layout, gpu)


def choose(model: str, gpus: int, gpu: Gpu, recipe: str | None) -> ScalingChoice | None:
    """Return the fastest layout that fits; None if none does."""
    args = FAMILY.flavors[model]
    block = Block(args.dim, args.dim, args.n_kv_heads * args.head_width, args.hidden_dim)
    layer, ends = _parameters(args, block)
    matrices = args.n_layers * layer + ends / 2
    flops = 6.0 * matrices + 12.0 * args.n_layers * args.dim * SEQ_LEN
    best: ScalingChoice | None = None
    for layout in _layouts(args, gpus):
        for checkpoint in _RECOMPUTED:
            for batch in (1, 2, 4):
                for microbatches in (1, 2, 4, 8, 16, 32):
                    sequences = batch * microbatches * layout.data
                    if sequences > MAX_SEQUENCES or (layout.pipeline > 1 and microbatches < layout.pipeline):
                        continue
                    in_flight = min(layout.pipeline, microbatches)
                    peak = _peak(args, block, layout, checkpoint, batch, in_flight)
                    if peak > (1 - MARGIN) * gpu.hbm_bytes:
                        continue
                    step = _seconds(args, block, layout, gpu, recipe, checkpoint, batch, microbatches)
                    rate = sequences * SEQ_LEN / step / gpus
                    if best is None or rate > best.tokens_per_second:
                        share = mfu(flops, rate, gpu)
                        best = ScalingChoice(
                            model, gpus, recipe, layout, checkpoint, batch, microbatches, peak, rate, share
                        )
    return best


def table(gpu: Gpu) -> list[tuple[str, int, ScalingChoice | None, ScalingChoice | None]]:
    """The rows (model, GPUs, bfloat16, float8)."""
    return [
        (model, gpus, choose(model, gpus, gpu, None), choose(model, gpus, gpu, "rowwise"))
        for model in SIZES
        for gpus in COUNTS
    ]


def _layout(choice: ScalingChoice) -> str:
    names = {"pipeline": "PP", "replicate": "x", "shard": "FSDP", "tensor": "TP"}
    axes = [f"{names[axis]} {n}" for axis, n in choice.layout.degrees.items() if n > 1]
    return f"{', '.join(axes)}; {choice.microbatches} x {choice.batch}; {choice.checkpoint}"


def report(gpu: Gpu, *, as_json: bool) -> str:
    """The table as Markdown, or as JSON."""
    rows = table(gpu)
    if as_json:
        choices: list[dict[str, Any]] = [asdict(c) for row in rows for c in row[2:] if c is not None]
        return json.dumps(choices, indent=2)
    lines = [
        f"| model | {gpu.name.upper()}s | layout; microbatches x sequences; checkpointing (float8) | GB | "
        "bf16 tok/s a GPU, MFU | float8 rowwise |",
        "|---|---|---|---|---|---|",
    ]
    for model, gpus, high, low in rows:
        if low is None:
            lines.append(f"| {model} | {gpus} | none fits | | | |")
            continue
        plain = "none fits" if high is None else f"{high.tokens_per_second:,.0f}, {100 * high.mfu:.0f} %"
        lines.append(
            f"| {model} | {gpus} | {_layout(low)} | {low.peak_bytes / 1e9:.0f} | {plain} | "
            f"{low.tokens_per_second:,.0f}, {100 * low.mfu:.0f} % |"
        )
    return "\n".join(lines)
