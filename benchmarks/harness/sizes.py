"""The layers that benchmarks run: Llama 3's, as the model registry has them, and small ones for --smoke."""

from __future__ import annotations

from octavo.families import ModelArgs
from octavo.families.llama3 import FAMILY

SMOKE = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=256, max_seq_len=64)


def linears(args: ModelArgs) -> dict[str, tuple[int, int]]:
    """The linear layers of one layer by size: the names that share it -> (K inputs, N outputs)."""
    kv = args.n_kv_heads * args.head_width
    return {
        "wq wo": (args.dim, args.dim),
        "wk wv": (args.dim, kv),
        "wq+wk+wv": (args.dim, args.dim + 2 * kv),
        "w1 w3": (args.dim, args.hidden_dim),
        "w1+w3": (args.dim, 2 * args.hidden_dim),
        "w2": (args.hidden_dim, args.dim),
    }


def model(flavor: str) -> ModelArgs:
    """The registered sizes of `flavor`, without the tokenizer's part."""
    return FAMILY.flavors[flavor]
