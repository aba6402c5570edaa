"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads are made of one
short latent vector per position.

    q = wq_b norm(wq_a x)                  or wq x, where queries have no latent vector
    latent, k_rope = wkv_a x               the rotated part of the key is the same for all heads
    k_nope, v = wkv_b norm(latent)
    attend with [q_nope, rope(q_rope)] and [k_nope, rope(k_rope)]

Training computes keys and values of all heads; only a decoder could profit from keeping the latent vector.

Shapes: B batch, S sequence, D model width, H heads, E width of a query's and a key's head.
"""

import torch
from torch import Tensor, nn

from octavo.families.model_args import ModelArgs
from octavo.models.attention import CoreAttention
from octavo.models.rope import apply_rope, logit_scale


class LatentAttention(nn.Module):
    """Causal self-attention with latent keys and values, over the whole sequence or with a mask."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        assert args.latent is not None
        sizes = self.sizes = args.latent
        heads, queries = args.n_heads, args.n_heads * args.head_width
        if sizes.q_rank:
            self.wq_a = nn.Linear(args.dim, sizes.q_rank, bias=False)
            self.q_norm = nn.RMSNorm(sizes.q_rank, eps=args.norm_eps)
            self.wq_b = nn.Linear(sizes.q_rank, queries, bias=False)
        else:
            self.wq = nn.Linear(args.dim, queries, bias=False)
        self.wkv_a = nn.Linear(args.dim, sizes.kv_rank + sizes.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(sizes.kv_rank, eps=args.norm_eps)
        self.wkv_b = nn.Linear(sizes.kv_rank, heads * (sizes.nope_dim + sizes.value_dim), bias=False)
        self.wo = nn.Linear(heads * sizes.value_dim, args.dim, bias=False)
        self.heads, self.logit_scale = heads, logit_scale(args)
        self.core: nn.Module = CoreAttention()

    def forward(self, x_BSD: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        y_BHSE = self.core(*self.project(x_BSD, table_2SE), mask_B1SS)
        return self.wo(y_BHSE.transpose(1, 2).flatten(-2))

    def project(self, x_BSD: Tensor, table_2SE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as heads, [B, H, S, width], rotated."""
        sizes = self.sizes
        q_BSN = self.wq_b(self.q_norm(self.wq_a(x_BSD))) if sizes.q_rank else self.wq(x_BSD)
        q_nope, q_rope = q_BSN.unflatten(-1, (self.heads, -1)).split([sizes.nope_dim, sizes.rope_dim], dim=-1)
        latent, k_rope = self.wkv_a(x_BSD).split([sizes.kv_rank, sizes.rope_dim], dim=-1)
        kv_BSHE = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (self.heads, -1))
        k_nope, v_BSHE = kv_BSHE.split([sizes.nope_dim, sizes.value_dim], dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), table_2SE).expand(-1, -1, self.heads, -1)
        q_BSHE = torch.cat([q_nope, apply_rope(q_rope, table_2SE)], dim=-1) * self.logit_scale
        k_BSHE = torch.cat([k_nope, k_rope], dim=-1)
        return q_BSHE.transpose(1, 2), k_BSHE.transpose(1, 2), v_BSHE.transpose(1, 2)
