"""How a Llama is checkpointed, compiled and sharded, in that order.

The order matters: compile must see the checkpointed layer, so that the partitioner knows what may be
recomputed; FSDP comes last, so that its gathers stay outside the compiled graphs. Compile works layer by
layer: one graph serves all.
"""

from torch import nn

from octavo.distributed.activation_checkpoint import checkpoint_layer
from octavo.distributed.fsdp import shard
from octavo.distributed.plan import Parallelize
from octavo.models.llama3.model import Llama


def parallelize(model: nn.Module, plan: Parallelize) -> None:
    """Apply `plan` to a Llama in place."""
    assert isinstance(model, Llama)
    for number, layer in list(model.layers.items()):
        model.layers[number] = checkpoint_layer(layer, plan.activation_checkpoint, int(number))

    if plan.compile_model:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)

    if plan.sharding is not None:
        # The last layer and the head are needed again at once in backward, so gathering them twice would
        # gain nothing.
        groups = [[layer] for layer in model.layers.values()]
        if model.output is not None:
            groups = [[model.tok_embeddings], *groups, [model.norm, model.output]]
        shard(model, groups, plan.sharding)
