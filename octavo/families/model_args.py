"""The arguments of a transformer: its sizes, and which of a few variants each part is."""

from dataclasses import dataclass


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
class ModelArgs:
    """Sizes and variants of one transformer.

    Attributes:
        head_dim: width of a head; 0 means dim / n_heads.
        hidden_dim: width of the feed-forward.
        vocab_size: 0 means the tokenizer's.
        qk_norm: RMSNorm of each head of q and k, before the rotation.
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
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = False
    max_seq_len: int = 8192
    document_end: int | None = None

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.n_heads
