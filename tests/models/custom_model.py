"""A custom model, registered as a user would do it: a byte-level bigram network."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from octavo import models
from octavo.distributed.fsdp import shard
from octavo.distributed.parallelize_plan import Parallelize
from octavo.models.init import InitRule, Normal


@dataclass(frozen=True)
class BigramArgs:
    width: int
    vocab_size: int = 0


class Bigram(nn.Module):
    """Each token's logits from that token alone."""

    def __init__(self, args: BigramArgs):
        super().__init__()
        self.embed = nn.Embedding(args.vocab_size, args.width)
        self.hidden = nn.Linear(args.width, args.width, bias=False)
        self.head = nn.Linear(args.width, args.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens_BS))))

    def init_rule(self, name: str) -> InitRule:
        return Normal(0.02)


def parallelize(model: nn.Module, plan: Parallelize) -> None:
    if plan.sharding is not None:
        shard(model, [[model.hidden]], plan.sharding)


models.register(
    models.ModelSpec(
        name="bigram",
        flavors={"small": BigramArgs(width=64)},
        configure=lambda args, vocab_size, seq_len: replace(args, vocab_size=vocab_size),
        build=Bigram,
        parallelize=parallelize,
        flops_per_token=lambda args, model, seq_len: 6.0 * args.width * (args.width + args.vocab_size),
    )
)
