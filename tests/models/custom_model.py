"""A bigram language model: the logits of the next token depend on the current token alone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from octavo import models
from octavo.config import ConfigError
from octavo.distributed.ddp import replicate_model
from octavo.distributed.fsdp import shard
from octavo.distributed.parallelize_plan import Parallelize
from octavo.models.init import InitRule, Normal


@dataclass(frozen=True)
class BigramArgs:
    width: int
    vocab_size: int = 0  # set by `configure`


class Bigram(nn.Module):
    def __init__(self, args: BigramArgs):
        super().__init__()
        self.embed = nn.Embedding(args.vocab_size, args.width)
        self.hidden = nn.Linear(args.width, args.width, bias=False)
        self.head = nn.Linear(args.width, args.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Map tokens [B, S] (int64) to logits [B, S, vocab]."""
        return self.head(torch.tanh(self.hidden(self.embed(tokens_BS))))

    def init_rule(self, name: str) -> InitRule:
        """The initial distribution of the parameter called `name`."""
        return Normal(0.02)


def configure(args: BigramArgs, vocab_size: int, seq_len: int) -> BigramArgs:
    """The arguments adapted to the tokenizer and the sequence length."""
    return replace(args, vocab_size=vocab_size)


def parallelize(model: nn.Module, plan: Parallelize) -> None:
    """Compile and shard the model in place, in this order."""
    if plan.tensor is not None or plan.context is not None:
        raise ConfigError("bigram supports neither tensor nor context parallelism; set both degrees to 1")
    if plan.compile_model:
        model.hidden.compile(fullgraph=True)
    if plan.sharding is not None:
        shard(model, [[model.hidden]], plan.sharding)
    elif plan.replicas is not None:
        replicate_model(model, plan.replicas)


def flops_per_token(args: BigramArgs, model: nn.Module, seq_len: int) -> float:
    """Forward and backward: 6 FLOPs per weight that is multiplied."""
    return 6.0 * args.width * (args.width + args.vocab_size)


models.register(
    models.ModelSpec(
        name="bigram",
        flavors={"small": BigramArgs(width=64), "large": BigramArgs(width=512)},
        configure=configure,
        build=Bigram,
        parallelize=parallelize,
        flops_per_token=flops_per_token,
    )
)
