"""The decoder-only transformer of all families, in plain PyTorch, without devices, sharding or float8.

    h = embed(tokens)
    for each layer:  h = h + attention(rms_norm(h));  h = h + w2(silu(w1 n) * w3 n)  with n = rms_norm(h)
    logits = output(rms_norm(h))

`ModelArgs` has the sizes, and which variant each part is. With tied embeddings there is no `output` module,
so that each parameter has one name. RMSNorm: arXiv:1910.07467.

Shapes: B batch, S sequence, P positions of this process, D model width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.families.model_args import ModelArgs
from octavo.models.attention import Attention, document_mask
from octavo.models.feed_forward import FeedForward
from octavo.models.init import InitRule, Normal, Ones
from octavo.models.latent_attention import LatentAttention
from octavo.models.loss import ChunkedLoss, attach_loss
from octavo.models.moe import MixtureOfExperts, routers
from octavo.models.rope import rope_table


class TransformerBlock(nn.Module):
    """One pre-norm layer: attention, then feed-forward or experts, each added to the residual stream."""

    def __init__(self, args: ModelArgs, number: int = 0):
        super().__init__()
        self.attention = Attention(args) if args.latent is None else LatentAttention(args)
        experts = args.experts_of(number)
        if experts is None:
            self.feed_forward = FeedForward(args.dim, args.hidden_dim)
        else:
            self.moe = MixtureOfExperts(args.dim, experts)
        self.has_experts = experts is not None
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, h_BSD: Tensor, table_2SE: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        h_BSD = h_BSD + self.attention(self.attention_norm(h_BSD), table_2SE, mask_B1SS)
        return h_BSD + self.feed(self.ffn_norm(h_BSD))

    def feed(self, x_BSD: Tensor) -> Tensor:
        """The feed-forward or the experts."""
        return self.moe(x_BSD) if self.has_experts else self.feed_forward(x_BSD)


class Transformer(nn.Module):
    """tokens [B, S] int64 -> logits [B, S, V].

    With `positions_P`, ascending, only those positions are computed: logits [B, P, V]. Attention's `core`
    must then provide the keys and values of the others (context parallelism).

    Pipeline stages drop layers, so `layers` is a dictionary by number and the remaining names do not change;
    likewise the embedding and the head (norm and output) may be None. A stage without an embedding takes the
    previous stage's activations `h[B, P, D]`, and `tokens_BS`; one without a head returns activations. With
    `labels_BS`, after `chunk_loss`, the summed loss is returned instead of logits.
    """

    rope: Tensor

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args, i) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = None if args.tie_embeddings else nn.Linear(args.dim, args.vocab_size, bias=False)
        self.chunked_loss: ChunkedLoss | None = None
        device = torch.get_default_device()
        shape = (2, args.max_seq_len, args.rope_width // 2)
        # A stranger's max_seq_len may be anything: on the meta device nothing is computed.
        rope = torch.empty(shape) if device.type == "meta" else rope_table(args).to(device)
        self.register_buffer("rope", rope, persistent=False)

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
        """Fill the buffers, which are empty after construction on the meta device."""
        self.rope.copy_(rope_table(self.args))
        for router in routers(self).values():
            router.init_buffers()

    def init_rule(self, name: str) -> InitRule:
        """The distribution of the initial values of the parameter called `name`.

        Matrices are normal with standard deviation 0.02; those that write into the residual stream (wo, w2)
        are scaled down with depth, 0.02 / sqrt(2 (layer + 1)). The output projection has 1 / sqrt(D), so that
        initial logits have unit variance and the initial loss is about ln V + 1/2.
        """
        *_, owner, last = name.split(".")
        leaf = owner if last == "weight" else last
        if leaf.endswith("norm"):
            return Ones()
        if leaf == "tok_embeddings":
            return Normal(0.02 if self.args.tie_embeddings else 1.0)
        if leaf == "output":
            return Normal(self.args.dim**-0.5, cutoff=3.0)
        if leaf in ("wo", "w2"):
            layer = int(name.split(".")[1])
            return Normal(0.02 / math.sqrt(2 * (layer + 1)))
        return Normal(0.02)
