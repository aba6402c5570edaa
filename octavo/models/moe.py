"""Mixture of experts: a router chooses a few of many feed-forwards for each token.

    scores = softmax or sigmoid of x . router^T         in float32, over all experts
    choose the experts with the largest scores + bias   the bias balances the load, and has no gradient
    y = sum over the chosen of weight . expert(x)       the weights are the scores, without the bias
    y = y + shared(x)                                   if there is an expert for all tokens

`MoEArgs` has each family's rule. Balance comes in two ways (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): by
the bias, which `octavo/train/balance_experts.py` moves towards experts with fewer tokens, and by a loss over
each sequence, E / C sum_e (share of choices of e) (mean score of e), whose gradient is added to that of the
scores.

Shapes: B batch, S sequence, T = B S tokens, D model width, E experts, C chosen per token, R = T C rows, F
width of an expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.distributed.tensor_parallel import local_part
from octavo.families.model_args import MoEArgs
from octavo.models.dispatch import Dispatcher, LocalDispatcher
from octavo.models.feed_forward import FeedForward
from octavo.models.grouped_mm import grouped_mm
from octavo.models.init import plain_name


class _InBackward(torch.autograd.Function):
    """`scores`, unchanged. Backward, which passes once whatever is recomputed, counts the load; and it adds
    the gradient of `loss`, a scalar, as if the training loss contained it.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, total_E: Tensor, load_E: Tensor) -> Tensor:
        ctx.save_for_backward(load_E)
        ctx.total_E = total_E
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (load_E,) = ctx.saved_tensors
        ctx.total_E.add_(load_E)
        return grads[0], grads[0].new_ones(()), None, None


def balance_loss(scores_BSE: Tensor, experts_BSC: Tensor) -> Tensor:
    """The sequence-wise balance loss, summed over all tokens; a scalar. Perfect balance is 1 per token."""
    experts = scores_BSE.shape[-1]
    shares_BSE = scores_BSE / scores_BSE.sum(-1, keepdim=True)
    chosen_BE = scores_BSE.new_zeros(scores_BSE.shape[0], experts)
    chosen_BE.scatter_add_(1, experts_BSC.flatten(1), scores_BSE.new_ones(experts_BSC.flatten(1).shape))
    share_BE = chosen_BE * (experts / (experts_BSC.shape[1] * experts_BSC.shape[2]))
    return (share_BE.unsqueeze(1) * shares_BSE).sum()


class Router(nn.Module):
    """Chooses experts. Its weight is no `nn.Linear`, so that no conversion to float8 takes it.

    Attributes:
        bias: added to the scores for choosing, float32 [E]; None unless the family has one.
        load: choices of each expert since the last update, float32 [E].
        loss_per_token: factor of the balance loss: its coefficient / tokens in the global batch.
    """

    bias: Tensor | None
    load: Tensor
    chooses = True  # recomputation must not choose anew

    def __init__(self, dim: int, args: MoEArgs):
        super().__init__()
        self.args = args
        self.weight = nn.Parameter(torch.empty(args.n_experts, dim))
        bias = torch.zeros(args.n_experts, dtype=torch.float32) if args.bias else None
        self.register_buffer("bias", bias)
        self.register_buffer("load", torch.zeros(args.n_experts, dtype=torch.float32), persistent=False)
        self.loss_per_token = 0.0

    def init_buffers(self) -> None:
        """Start with an empty count, and no bias."""
        self.load.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, C] in float32, experts [T, C], and the load [E] of these tokens, int64."""
        args = self.args
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BSE = F.linear(x_BSD.float(), local_part(self.weight).float())
        scores_BSE = logits_BSE.softmax(-1) if args.score == "softmax" else logits_BSE.sigmoid()
        experts_BSC = self.choose(scores_BSE.detach())
        load_E = torch.zeros_like(self.load, dtype=torch.int64)
        load_E = load_E.scatter_add(0, experts_BSC.flatten(), torch.ones_like(experts_BSC.flatten()))
        if self.training:
            loss = scores_BSE.new_zeros(())
            if args.balance_loss:
                loss = balance_loss(scores_BSE, experts_BSC) * self.loss_per_token
            scores_BSE = _InBackward.apply(scores_BSE, loss, self.load, load_E)
        weights_BSC = scores_BSE.gather(-1, experts_BSC)
        if args.renormalise:
            weights_BSC = weights_BSC / (weights_BSC.sum(-1, keepdim=True) + 1e-20)
        return (weights_BSC * args.scale).flatten(0, 1), experts_BSC.flatten(0, 1), load_E

    def choose(self, scores_BSE: Tensor) -> Tensor:
        """The experts with the largest scores + bias; int64 [B, S, C]."""
        args = self.args
        if self.bias is not None:
            scores_BSE = scores_BSE + self.bias
        if args.groups > 1:  # only experts of the groups whose best two have the largest sums
            grouped = scores_BSE.unflatten(-1, (args.groups, -1))
            sums = grouped.topk(2, dim=-1).values.sum(-1)
            kept = torch.zeros_like(sums).scatter(-1, sums.topk(args.groups_kept, dim=-1).indices, 1.0)
            scores_BSE = grouped.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).flatten(-2)
        return scores_BSE.topk(args.top_k, dim=-1).indices


class Experts(nn.Module):
    """The feed-forwards of all experts, as one tensor `[E, out, in]` for each of their matrices.

    Attributes:
        product: `grouped_mm`, or one of the same meaning; conversion to float8 replaces it.
    """

    grouped_weights = ("w1", "w2", "w3")

    def __init__(self, dim: int, args: MoEArgs):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(args.n_experts, args.hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(args.n_experts, dim, args.hidden_dim))
        self.w3 = nn.Parameter(torch.empty(args.n_experts, args.hidden_dim, dim))
        self.product = grouped_mm

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        w1, w2, w3 = local_part(self.w1), local_part(self.w2), local_part(self.w3)
        gate_RF = F.silu(self.product(x_RD, w1, ends_E))
        return self.product(gate_RF * self.product(x_RD, w3, ends_E), w2, ends_E)


class MixtureOfExperts(nn.Module):
    """x [B, S, D] -> the weighted sum of its experts' outputs, [B, S, D]."""

    def __init__(self, dim: int, args: MoEArgs):
        super().__init__()
        self.router = Router(dim, args)
        self.experts = Experts(dim, args)
        self.shared = FeedForward(dim, args.shared_dim) if args.shared_dim else None
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor) -> Tensor:
        weights_TC, experts_TC, load_E = self.router(x_BSD)
        rows_RD, ends_E, route = self.dispatcher.send(x_BSD.flatten(0, 1), experts_TC, load_E)
        y_TCD = self.dispatcher.bring_back(self.experts(rows_RD, ends_E), route)
        y_TD = (y_TCD.float() * weights_TC.unsqueeze(-1)).sum(1).to(x_BSD.dtype)
        y_BSD = y_TD.view_as(x_BSD)
        return y_BSD if self.shared is None else y_BSD + self.shared(x_BSD)


def routers(model: nn.Module) -> dict[str, Router]:
    """The routers of `model` by their layers' names, without wrappers."""
    return {
        plain_name(name).removesuffix(".moe.router"): module
        for name, module in model.named_modules()
        if isinstance(module, Router)
    }
