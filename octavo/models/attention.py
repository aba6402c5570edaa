"""Causal grouped-query attention (arXiv:2305.13245), optionally with a norm of each head of q and k.

Where attention stays within documents, positions still count from the start of the sequence: rotary attention
depends on distances only, so a document's logits do not depend on where in the sequence it stands, up to
rounding.

Shapes: B batch, S sequence, D model width, H query heads, G key/value heads, E head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.families.model_args import ModelArgs
from octavo.models.rope import apply_rope


def document_mask(tokens_BS: Tensor, document_end: int) -> Tensor:
    """Causal mask within documents, bool [B, 1, S, S], True where a query attends to a key.

    A document includes the token `document_end` that ends it. A sequence may start in the middle of one.
    """
    ends_BS = (tokens_BS == document_end).long()
    document_BS = ends_BS.cumsum(1) - ends_BS
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril().unsqueeze(1)


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(E)) v, causal or with a mask. It has no parameters."""

    def forward(
        self, q_BHSE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask_B1SS: Tensor | None = None
    ) -> Tensor:
        plain_heads = mask_B1SS is not None or (q_BHSE.is_cuda and q_BHSE.dtype == torch.float32)
        if plain_heads:  # no fused kernel takes groups with a mask, nor on a GPU in float32
            groups = q_BHSE.shape[1] // k_BGSE.shape[1]
            k_BGSE, v_BGSE = (x.repeat_interleave(groups, dim=1) for x in (k_BGSE, v_BGSE))
        if q_BHSE.device.type == "cpu" and not torch.compiler.is_compiling():
            # The CPU kernel takes a fifth longer on strided heads.
            q_BHSE, k_BGSE, v_BGSE = q_BHSE.contiguous(), k_BGSE.contiguous(), v_BGSE.contiguous()
        return F.scaled_dot_product_attention(
            q_BHSE, k_BGSE, v_BGSE, attn_mask=mask_B1SS, is_causal=mask_B1SS is None, enable_gqa=True
        )


class Attention(nn.Module):
    """Causal grouped-query self-attention, over the whole sequence or with a mask."""

    same_input = (("wq", "wk", "wv"),)  # linears that read the same tensor

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_width = args.head_width
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_width, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_width, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_width, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_width, args.dim, bias=False)
        if args.qk_norm:
            self.q_norm = nn.RMSNorm(args.head_width, eps=args.norm_eps)
            self.k_norm = nn.RMSNorm(args.head_width, eps=args.norm_eps)
        self.norms_heads = args.qk_norm
        self.core: nn.Module = CoreAttention()

    def forward(self, x_BSD: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        return self.wo(self.attend(self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD), table_2SE, mask_B1SS))

    def project(self, x_BSD: Tensor, table_2SE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as heads, [B, heads, S, E]."""
        return self.heads(self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD), table_2SE)

    def attend(
        self, q_BSN: Tensor, k_BSN: Tensor, v_BSN: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None
    ) -> Tensor:
        """The heads' outputs [B, S, H E] from the q, k and v projections, each [B, S, heads x E]."""
        y_BHSE = self.core(*self.heads(q_BSN, k_BSN, v_BSN, table_2SE), mask_B1SS)
        return y_BHSE.transpose(1, 2).flatten(-2)

    def heads(
        self, q_BSN: Tensor, k_BSN: Tensor, v_BSN: Tensor, table_2SE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projections as heads, [B, heads, S, E]; q and k normed if the model does that, and rotated."""
        q_BSHE, k_BSGE, v_BSGE = (x.unflatten(-1, (-1, self.head_width)) for x in (q_BSN, k_BSN, v_BSN))
        if self.norms_heads:
            q_BSHE, k_BSGE = self.q_norm(q_BSHE), self.k_norm(k_BSGE)
        q_BSHE, k_BSGE = apply_rope(q_BSHE, table_2SE), apply_rope(k_BSGE, table_2SE)
        return q_BSHE.transpose(1, 2), k_BSGE.transpose(1, 2), v_BSGE.transpose(1, 2)
