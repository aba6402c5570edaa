"""How a Llama is shared among processes, checkpointed, compiled and sharded, in that order.

The order matters. Tensor parallel styles hook the layers' own modules, so they come while those can be found
by name. Compile must see the checkpointed layer, so that the partitioner knows what may be recomputed; FSDP
comes last, so that its gathers stay outside the compiled graphs. Compile works layer by layer: one graph
serves all.
"""

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, SequenceParallel, parallelize_module

from octavo.config import sizes
from octavo.distributed.activation_checkpoint import checkpoint_layer
from octavo.distributed.context_parallel import share_sequences
from octavo.distributed.ddp import replicate_model
from octavo.distributed.fsdp import shard
from octavo.distributed.parallelize_plan import Parallelize, TensorParallel
from octavo.distributed.tensor_parallel import lay_logits, overlap_products, settle
from octavo.models.llama3.fused_block import fuse
from octavo.models.llama3.model import Llama, LlamaArgs, TransformerBlock

_TOKENS, _WHOLE, _LAST = Shard(1), Replicate(), Shard(-1)


def parallelize(model: nn.Module, plan: Parallelize) -> None:
    """Apply `plan` to a Llama in place, whose `shared_sizes` divide over the processes."""
    assert isinstance(model, Llama)
    if plan.context is not None:
        share_sequences(model, model.set_core_attention, plan.context, ring=plan.ring)

    if plan.tensor is not None:
        share_products(model, plan.tensor)
        if plan.tensor.asynchronous and plan.compile_model:
            overlap_products(plan.tensor)

    if plan.fusion is not None:
        fuse(model, plan.fusion)

    for number, layer in list(model.layers.items()):
        model.layers[number] = checkpoint_layer(layer, plan.activation_checkpoint, int(number))

    if plan.compile_model:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)

    if plan.sharding is not None:
        # The last layer and the head are needed again at once in backward, so gathering them twice would
        # gain nothing.
        groups: list[list[nn.Module | None]] = [[layer] for layer in model.layers.values()]
        if not model.args.tie_embeddings:
            groups = [[model.tok_embeddings], *groups, [model.norm, model.output]]
        there = [[part for part in group if part is not None] for group in groups]
        # The embeddings give the layers their dtype. The rotary table stays float32: rounded to bfloat16 it
        # would turn pairs by up to 0.16 degrees too far or too little, and stretch them by up to 0.3%.
        shard(model, [group for group in there if group], plan.sharding, cast_inputs=False)
    elif plan.replicas is not None:
        replicate_model(model, plan.replicas)


def shared_sizes(args: LlamaArgs) -> dict[str, int]:
    """What tensor parallelism shares, by name."""
    return sizes.shared_sizes(args.dim, args.n_heads, args.n_kv_heads, args.hidden_dim)


def share_products(model: Llama, plan: TensorParallel) -> None:
    """Share the matrix products of `model`, and between them the tokens (arXiv:2205.05198).

    Between a column-wise and a row-wise product features are sharded; everywhere else tokens are.
    """
    styles: dict[str, ParallelStyle] = {}
    if model.tok_embeddings is not None:
        styles["tok_embeddings"] = plan.rows(
            model.tok_embeddings, input_layouts=_WHOLE, output_layouts=_TOKENS
        )
    if model.norm is not None:
        styles["norm"] = SequenceParallel()
    if model.output is not None:
        styles["output"] = plan.columns(
            model.output, input_layouts=_TOKENS, output_layouts=_LAST, use_local_output=False
        )
    parallelize_module(model, plan.mesh, styles)
    if model.tok_embeddings is not None:
        settle(model.tok_embeddings)
    lay_logits(model, plan, _LAST)
    for layer in model.layers.values():
        parallelize_module(layer, plan.mesh, _layer_styles(layer, plan))


def _layer_styles(layer: nn.Module, plan: TensorParallel) -> dict[str, ParallelStyle]:
    assert isinstance(layer, TransformerBlock)
    a, f = layer.attention, layer.feed_forward
    return {
        "attention_norm": SequenceParallel(),
        "attention": plan.gather([a.wq, a.wk, a.wv], given=_TOKENS, wanted=_WHOLE, inputs=3),
        "attention.wq": plan.columns(a.wq),
        "attention.wk": plan.columns(a.wk),
        "attention.wv": plan.columns(a.wv),
        "attention.wo": plan.rows(a.wo, output_layouts=_TOKENS),
        "ffn_norm": SequenceParallel(),
        "feed_forward": plan.gather([f.w1, f.w3], given=_TOKENS, wanted=_WHOLE, inputs=1),
        "feed_forward.w1": plan.columns(f.w1),
        "feed_forward.w3": plan.columns(f.w3),
        "feed_forward.w2": plan.rows(f.w2, output_layouts=_TOKENS),
    }
