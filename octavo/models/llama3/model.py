"""Llama 3 in plain PyTorch, without devices, sharding or float8.

    h = embed(tokens)
    for each layer:  h = h + attention(rms_norm(h));  h = h + w2(silu(w1 n) * w3 n)  with n = rms_norm(h)
    logits = output(rms_norm(h))

Sources: Llama 3 (arXiv:2407.21783), RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), grouped-query
attention (arXiv:2305.13245), SwiGLU (arXiv:2002.05202).

Four choices. Rotary pairs are interleaved, (x0, x1), (x2, x3), ..., as in Meta's checkpoints; Hugging Face's
layout is a permutation of wq and wk (`hf_state_dict.py`). Compiled rotation is real arithmetic in float32,
because inductor generates no code for complex numbers. With tied embeddings there is no `output` module, so
that each parameter has one name. Where attention stays within documents, positions still count from the start
of the sequence: rotary attention depends on distances only, so a document's logits do not depend on where in
the sequence it stands, up to rounding.

Shapes: B batch, S sequence, D model width, H query heads, G key/value heads, E head width, F feed-forward
width, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.init import InitRule, Normal, Ones
from octavo.models.loss import ChunkedLoss, attach_loss


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rotary scaling: low frequencies are divided by `factor`, for contexts longer than
    `original_context`; see `rope_frequencies`.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaArgs:
    """Sizes of one Llama.

    Attributes:
        vocab_size: 0 means the tokenizer's.
        max_seq_len: positions in the rotary table.
        document_end: the token id that ends a document; attention then stays within documents. None:
            attention spans the whole sequence.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int = 128_256
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_seq_len: int = 8192
    document_end: int | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def rope_frequencies(args: LlamaArgs) -> Tensor:
    """The rotary frequencies [E/2] in radians per position, scaled by `args.rope_scaling` if it is set.

    Wavelengths shorter than original_context / high_freq_factor are kept, those longer than original_context
    / low_freq_factor are stretched by `factor`, and those in between are blended.
    """
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.int64, device="cpu").float() / args.head_dim
    freqs = 1.0 / (args.rope_theta**exponent)
    scaling = args.rope_scaling
    if scaling is None:
        return freqs
    turns = scaling.original_context * freqs / (2 * math.pi)  # full turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


def rope_table(args: LlamaArgs) -> Tensor:
    """cos and sin of the angles of every position, float32 [2, max_seq_len, E/2]."""
    positions = torch.arange(args.max_seq_len, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, rope_frequencies(args))
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x_BSHE: Tensor, table_2SE: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its position's angle: in float32, returned in x's dtype."""
    cos, sin = table_2SE[:, : x_BSHE.shape[1], None, :].float()
    pairs = x_BSHE.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses real operations and has no complex ones
        even, odd = pairs.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same values in one pass over memory instead of seven
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).type_as(x_BSHE)


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

    def __init__(self, args: LlamaArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.core: nn.Module = CoreAttention()

    def forward(self, x_BSD: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        return self.wo(self.attend(self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD), table_2SE, mask_B1SS))

    def attend(
        self, q_BSN: Tensor, k_BSN: Tensor, v_BSN: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None
    ) -> Tensor:
        """The heads' outputs [B, S, H E] from the q, k and v projections, each [B, S, heads x E]."""
        q_BSHE = apply_rope(q_BSN.unflatten(-1, (-1, self.head_dim)), table_2SE)
        k_BSGE = apply_rope(k_BSN.unflatten(-1, (-1, self.head_dim)), table_2SE)
        v_BSGE = v_BSN.unflatten(-1, (-1, self.head_dim))
        y_BHSE = self.core(q_BSHE.transpose(1, 2), k_BSGE.transpose(1, 2), v_BSGE.transpose(1, 2), mask_B1SS)
        return y_BHSE.transpose(1, 2).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    same_input = (("w1", "w3"),)

    def __init__(self, args: LlamaArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class TransformerBlock(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, args: LlamaArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, h_BSD: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        h_BSD = h_BSD + self.attention(self.attention_norm(h_BSD), table_2SE, mask_B1SS)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class Llama(nn.Module):
    """tokens [B, S] int64 -> logits [B, S, V].

    With `positions_P`, ascending, only those positions are computed: logits [B, P, V]. Attention's `core`
    must then provide the keys and values of the others (context parallelism).

    Pipeline stages drop layers, so `layers` is a dictionary by number and the remaining names do not change;
    likewise the embedding and the head (norm and output) may be None. A stage without an embedding takes the
    previous stage's activations `h[B, P, D]`, and `tokens_BS`; one without a head returns activations. With
    `labels_BS`, after `chunk_loss`, the summed loss is returned instead of logits.
    """

    rope: Tensor

    def __init__(self, args: LlamaArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = None if args.tie_embeddings else nn.Linear(args.dim, args.vocab_size, bias=False)
        self.chunked_loss: ChunkedLoss | None = None
        self.register_buffer("rope", rope_table(args).to(torch.get_default_device()), persistent=False)

    def forward(
        self,
        h: Tensor,
        positions_P: Tensor | None = None,
        *,
        tokens_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
    ) -> Tensor:
        if tokens_BS is None:
            tokens_BS = h
        if tokens_BS.shape[1] > self.args.max_seq_len:
            raise ValueError(
                f"{tokens_BS.shape[1]} tokens in a sequence, but the rotary table has "
                f"{self.args.max_seq_len} positions; build the model with a larger max_seq_len"
            )
        end = self.args.document_end
        mask_B1SS = None if end is None else document_mask(tokens_BS, end)
        table = self.rope
        if positions_P is not None:
            table = table[:, positions_P]
            mask_B1SS = None if mask_B1SS is None else mask_B1SS[:, :, positions_P]
        h_BSD = h
        if self.tok_embeddings is not None:
            h_BSD = self.tok_embeddings(tokens_BS if positions_P is None else tokens_BS[:, positions_P])
        for layer in self.layers.values():
            h_BSD = layer(h_BSD, table, mask_B1SS)
        if self.norm is None:
            return h_BSD
        h_BSD = self.norm(h_BSD)
        if labels_BS is not None:
            if self.output is not None:
                return self.output(h_BSD, labels_BS)
            assert self.chunked_loss is not None
            return self.chunked_loss.from_weight(h_BSD, self.tok_embeddings.weight, labels_BS)
        if self.output is None:
            return F.linear(h_BSD, self.tok_embeddings.weight)
        return self.output(h_BSD)

    def chunk_loss(self, loss: ChunkedLoss) -> None:
        """Make the model return the summed loss when it is called with `labels_BS`."""
        if self.output is not None:
            attach_loss(self.output, loss)
        self.chunked_loss = loss

    def set_core_attention(self, core: nn.Module) -> None:
        """Replace the `CoreAttention` of every layer."""
        for layer in self.layers.values():
            assert isinstance(layer, TransformerBlock)
            layer.attention.core = core

    def init_buffers(self) -> None:
        """Fill the rotary table, which is empty after construction on the meta device."""
        self.rope.copy_(rope_table(self.args))

    def init_rule(self, name: str) -> InitRule:
        """The distribution of the initial values of the parameter called `name`.

        Matrices are normal with standard deviation 0.02; those that write into the residual stream (wo, w2)
        are scaled down with depth, 0.02 / sqrt(2 (layer + 1)). The output projection has 1 / sqrt(D), so that
        initial logits have unit variance and the initial loss is about ln V + 1/2.
        """
        leaf = name.split(".")[-2]
        if leaf in ("attention_norm", "ffn_norm", "norm"):
            return Ones()
        if leaf == "tok_embeddings":
            return Normal(0.02 if self.args.tie_embeddings else 1.0)
        if leaf == "output":
            return Normal(self.args.dim**-0.5, cutoff=3.0)
        if leaf in ("wo", "w2"):
            layer = int(name.split(".")[1])
            return Normal(0.02 / math.sqrt(2 * (layer + 1)))
        return Normal(0.02)
