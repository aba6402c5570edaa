"""The arguments of a transformer: its sizes, and which of a few variants each part is."""

from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rotary scaling: low frequencies are divided by `factor`, for contexts longer than
    `original_context` (`octavo/models/rope.py::rope_frequencies`).
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): low frequencies are divided by `factor`, high ones are kept, and attention's
    logits are scaled by (0.1 mscale ln factor + 1)^2.

    Attributes:
        beta_fast, beta_slow: full turns within `original_context` from which on frequencies are kept, and up
            to which they are divided.
    """

    factor: float
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0


@dataclass(frozen=True)
class LatentArgs:
    """Multi-head latent attention (`octavo/models/latent_attention.py`).

    Attributes:
        kv_rank, q_rank: widths of the latent vectors. q_rank None: queries come from the input itself.
        nope_dim, rope_dim: widths of the parts of a query's and a key's head without and with rotation.
        value_dim: width of a value's head.
    """

    kv_rank: int
    q_rank: int | None = None
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128


@dataclass(frozen=True)
class MoEArgs:
    """A mixture of experts in place of the feed-forward (`octavo/models/moe.py`).

    Attributes:
        n_experts, top_k, hidden_dim: how many there are, how many serve each token, the width of each.
        n_shared: how many experts' width the feed-forward has that serves every token; 0: there is none.
        first_dense: the layers before this one have an ordinary feed-forward.
        score: what makes scores of the router's logits.
        renormalise: divide the weights of a token's experts by their sum. scale: then multiply them.
        bias: a bias per expert decides, together with the score, who is chosen.
        groups, groups_kept: only the experts of the `groups_kept` best of `groups` groups may be chosen.
        bias_rate: how far a step moves each bias. balance_loss: the coefficient of the balance loss.
    """

    n_experts: int
    top_k: int
    hidden_dim: int
    n_shared: int = 0
    first_dense: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    bias_rate: float = 1e-3
    balance_loss: float = 0.0

    @property
    def shared_dim(self) -> int:
        return self.n_shared * self.hidden_dim

    def idle(self, dim: int) -> int:
        """The parameters of one layer's experts that do not serve a token, in a model of width `dim`."""
        return 3 * dim * self.hidden_dim * (self.n_experts - self.top_k)


@dataclass(frozen=True)
class ModelArgs:
    """Sizes and variants of one transformer.

    Attributes:
        head_dim: width of a head; 0 means dim / n_heads.
        hidden_dim: width of the feed-forward.
        vocab_size: 0 means the tokenizer's.
        qk_norm: RMSNorm of each head of q and k, before the rotation.
        latent: the widths of multi-head latent attention; None: grouped-query attention.
        moe: its layers' experts; None: every layer has an ordinary feed-forward.
        max_seq_len: positions in the rotary table.
        document_end: the token id that ends a document; attention then stays within documents. None:
            attention spans the whole sequence.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    head_dim: int = 0
    vocab_size: int = 128_256
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | Yarn | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False
    latent: LatentArgs | None = None
    moe: MoEArgs | None = None
    tie_embeddings: bool = False
    max_seq_len: int = 8192
    document_end: int | None = None

    @property
    def head_width(self) -> int:
        """The width of a query's and a key's head."""
        if self.latent is not None:
            return self.latent.nope_dim + self.latent.rope_dim
        return self.head_dim or self.dim // self.n_heads

    @property
    def value_width(self) -> int:
        """The width of a value's head."""
        return self.head_width if self.latent is None else self.latent.value_dim

    @property
    def rope_width(self) -> int:
        """The width of the part of a head that is rotated."""
        return self.head_width if self.latent is None else self.latent.rope_dim

    def experts_of(self, layer: int) -> MoEArgs | None:
        """The experts of a layer; None if it has an ordinary feed-forward."""
        return self.moe if self.moe is not None and layer >= self.moe.first_dense else None


def get(args: ModelArgs, name: str) -> Any:
    """The field `name` of `args`; `moe.top_k` is a field of its `moe`."""
    return reduce(getattr, name.split("."), args)
