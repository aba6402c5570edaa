"""Applies context and tensor parallelism, fusion, activation checkpointing, compile and FSDP2 to a
transformer, in that order.

The order matters. Tensor-parallel styles hook the layers' modules by name, so they come before wrappers
change the names. Compile must see the checkpointed layer, so that the partitioner knows what it may
recompute. FSDP2 comes last, so that its gathers stay outside the compiled graphs. Layers are compiled one by
one and share one graph.
"""

from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ParallelStyle,
    PrepareModuleInputOutput,
    SequenceParallel,
    parallelize_module,
)

from octavo.config import ConfigError
from octavo.distributed.activation_checkpoint import checkpoint_layer
from octavo.distributed.context_parallel import share_sequences
from octavo.distributed.ddp import replicate_model
from octavo.distributed.fsdp import shard
from octavo.distributed.parallelize_plan import Parallelize, TensorParallel
from octavo.distributed.tensor_parallel import ShardedParameters, lay_logits, overlap_products, settle
from octavo.models.fused_block import fuse_layer
from octavo.models.moe import MixtureOfExperts
from octavo.models.transformer import Transformer, TransformerBlock
from octavo.preflight.sizes import unsplit

_BY_TOKEN, _REPLICATED, _BY_FEATURE = Shard(1), Replicate(), Shard(-1)


def parallelize(model: nn.Module, plan: Parallelize) -> None:
    """Apply `plan` to a transformer in place; tensor parallelism divides each of its `shared_sizes`."""
    assert isinstance(model, Transformer)
    tensor, context = plan.tensor and plan.tensor.mesh, plan.context
    degrees = {"tensor": tensor.size() if tensor else 1, "context": context.size() if context else 1}
    for problem in unsplit(model.args, **degrees):
        raise ConfigError(problem)
    if plan.context is not None:
        share_sequences(model, model.set_core_attention, plan.context, ring=plan.ring)

    if plan.tensor is not None:
        apply_tensor_parallel(model, plan.tensor)
        if plan.tensor.asynchronous and plan.compile_model:
            overlap_products(plan.tensor)

    if plan.fusion is not None:
        for layer in model.layers.values():
            fuse_layer(layer, plan.fusion)

    for number, layer in list(model.layers.items()):
        model.layers[number] = checkpoint_layer(layer, plan.activation_checkpoint, int(number))

    if plan.compile_model:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)

    if plan.sharding is not None:
        # The last group stays gathered, because backward needs it first.
        groups: list[list[nn.Module | None]] = [[layer] for layer in model.layers.values()]
        if not model.args.tie_embeddings:
            groups = [[model.tok_embeddings], *groups, [model.norm, model.output]]
        present = [[part for part in group if part is not None] for group in groups]
        # Inputs are not cast: the embeddings set the layers' dtype, and the rotary table stays float32.
        # Rounded to bfloat16 it would rotate pairs by up to 0.16 degrees too far or too little, and scale
        # them by up to 0.3%.
        shard(model, [group for group in present if group], plan.sharding, cast_inputs=False)
    elif plan.replicas is not None:
        replicate_model(model, plan.replicas)


def apply_tensor_parallel(model: Transformer, plan: TensorParallel) -> None:
    """Apply tensor and sequence parallelism (arXiv:2205.05198) to `model` in place.

    Activations are sharded by features between a column-wise and a row-wise linear, by tokens elsewhere.
    """
    styles: dict[str, ParallelStyle] = {}
    if model.tok_embeddings is not None:
        styles["tok_embeddings"] = plan.rows(
            model.tok_embeddings, input_layouts=_REPLICATED, output_layouts=_BY_TOKEN
        )
    if model.norm is not None:
        styles["norm"] = SequenceParallel()
    if model.output is not None:
        styles["output"] = plan.columns(
            model.output, input_layouts=_BY_TOKEN, output_layouts=_BY_FEATURE, use_local_output=False
        )
    parallelize_module(model, plan.mesh, styles)
    if model.tok_embeddings is not None:
        settle(model.tok_embeddings)
    lay_logits(model, plan, _BY_FEATURE)
    for layer in model.layers.values():
        parallelize_module(layer, plan.mesh, _layer_styles(layer, plan))


def _layer_styles(layer: nn.Module, plan: TensorParallel) -> dict[str, ParallelStyle]:
    assert isinstance(layer, TransformerBlock)
    a = layer.attention
    styles: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": plan.gather([a.wq, a.wk, a.wv], given=_BY_TOKEN, wanted=_REPLICATED, inputs=3),
        "attention.wq": plan.columns(a.wq),
        "attention.wk": plan.columns(a.wk),
        "attention.wv": plan.columns(a.wv),
        "attention.wo": plan.rows(a.wo, output_layouts=_BY_TOKEN),
        "ffn_norm": SequenceParallel(),
    }
    if a.norms_heads:  # each process norms its own heads
        for name in ("attention.q_norm", "attention.k_norm"):
            styles[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
    if layer.has_experts:
        return styles | _expert_styles(layer.moe, plan)
    f = layer.feed_forward
    return styles | {
        "feed_forward": plan.gather([f.w1, f.w3], given=_BY_TOKEN, wanted=_REPLICATED, inputs=1),
        "feed_forward.w1": plan.columns(f.w1),
        "feed_forward.w3": plan.columns(f.w3),
        "feed_forward.w2": plan.rows(f.w2, output_layouts=_BY_TOKEN),
    }


def _expert_styles(moe: MixtureOfExperts, plan: TensorParallel) -> dict[str, ParallelStyle]:
    """Every process routes all tokens, and has a part of each expert's features. Their outputs are parts of
    sums, which are added up where the tokens are divided again.
    """
    styles: dict[str, ParallelStyle] = {
        "moe": PrepareModuleInputOutput(
            input_layouts=_BY_TOKEN,
            desired_input_layouts=_REPLICATED,
            use_local_input=True,
            output_layouts=Partial(),
            desired_output_layouts=_BY_TOKEN,
        ),
        "moe.router": ShardedParameters(weight=_REPLICATED),
        "moe.experts": ShardedParameters(w1=Shard(1), w3=Shard(1), w2=Shard(2)),
    }
    if moe.shared is not None:
        styles |= {
            "moe.shared.w1": plan.columns(moe.shared.w1),
            "moe.shared.w3": plan.columns(moe.shared.w3),
            "moe.shared.w2": plan.rows(moe.shared.w2, output_layouts=Partial()),
        }
    return styles
