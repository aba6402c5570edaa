"""The Llama 3 family: its flavors, and its entry in the model registry.

A plain size is the current release (8B, 70B and 405B are 3.1; 1B and 3B are 3.2); the suffix `-3.0` is the
same size without rotary scaling. The sizes are those of the published configurations.
"""

from dataclasses import replace

from torch import nn

from octavo import models
from octavo.config import ConfigError, sizes
from octavo.models.llama3.decode import Decoder
from octavo.models.llama3.hf_config import from_config, to_config
from octavo.models.llama3.hf_state_dict import from_hf, to_hf
from octavo.models.llama3.model import Llama, LlamaArgs, RopeScaling
from octavo.models.llama3.parallelize import parallelize, shared_sizes
from octavo.models.loss import ChunkedLoss

_LLAMA_3_1 = RopeScaling(factor=8.0)
_LLAMA_3_2 = RopeScaling(factor=32.0)

_SIZES = {
    "8B": LlamaArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336),
    "70B": LlamaArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672),
    "405B": LlamaArgs(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, hidden_dim=53248),
}
_SMALL = {
    "1B": LlamaArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, tie_embeddings=True),
    "3B": LlamaArgs(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, hidden_dim=8192, tie_embeddings=True),
}

FLAVORS: dict[str, LlamaArgs] = {
    "debugmodel": LlamaArgs(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, hidden_dim=768, vocab_size=0),
    **{name: replace(args, rope_scaling=_LLAMA_3_2) for name, args in _SMALL.items()},
    **{name: replace(args, rope_scaling=_LLAMA_3_1) for name, args in _SIZES.items()},
    **{f"{name}-3.0": args for name, args in _SIZES.items()},
}


def configure(args: LlamaArgs, vocab_size: int, seq_len: int) -> LlamaArgs:
    """`args` for a tokenizer of `vocab_size` tokens and sequences of `seq_len` tokens.

    Raises `ConfigError` if the tokenizer has more tokens than the model has embeddings.
    """
    if args.vocab_size and vocab_size > args.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size:,} tokens, but this model has {args.vocab_size:,} embeddings; "
            "set model.hf_assets_path to the model's own tokenizer"
        )
    return replace(args, vocab_size=args.vocab_size or vocab_size, max_seq_len=seq_len)


def flops_per_token(args: LlamaArgs, model: nn.Module, seq_len: int) -> float:
    """Model FLOPs per token of forward and backward: 6 per matrix parameter, and 12 L H E S for attention.

    The convention of PaLM's appendix B (arXiv:2204.02311), which published MFU figures use: attention counts
    in full although half of it is masked, recomputation does not count, and neither does an embedding unless
    it is tied to the output projection.
    """
    parameters = sum(p.numel() for p in model.parameters())
    if not args.tie_embeddings:
        parameters -= args.vocab_size * args.dim
    return 6.0 * parameters + 12.0 * args.n_layers * args.dim * seq_len


def units(args: LlamaArgs) -> list[tuple[str, ...]]:
    """The units of pipeline stages; `ConfigError` for tied embeddings, which first and last stage share."""
    return sizes.units(args.n_layers, tied=args.tie_embeddings)


def layer_products(args: LlamaArgs, seq_len: int) -> tuple[str, list[tuple[str, float]]]:
    """The layers' prefix, and one layer's matrix products in order of forward, with FLOPs per token.

    Attention counts as in `flops_per_token`.
    """
    queries, groups = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    return "layers.", [
        ("attention.wq", 2.0 * args.dim * queries),
        ("attention.wk", 2.0 * args.dim * groups),
        ("attention.wv", 2.0 * args.dim * groups),
        ("attention.core", 4.0 * queries * seq_len),
        ("attention.wo", 2.0 * args.dim * queries),
        ("feed_forward.w1", 2.0 * args.dim * args.hidden_dim),
        ("feed_forward.w3", 2.0 * args.dim * args.hidden_dim),
        ("feed_forward.w2", 2.0 * args.dim * args.hidden_dim),
    ]


def _chunk_loss(model: nn.Module, loss: ChunkedLoss) -> None:
    assert isinstance(model, Llama)
    model.chunk_loss(loss)


SPEC = models.ModelSpec(
    name="llama3",
    flavors=FLAVORS,
    configure=configure,
    build=Llama,
    parallelize=parallelize,
    flops_per_token=flops_per_token,
    layer_products=layer_products,
    mask_documents=lambda args, document_end: replace(args, document_end=document_end),
    hugging_face=models.HuggingFace("llama", to_hf, from_hf, to_config, from_config),
    decoder=Decoder,
    fuses=True,
    casts_inputs=True,
    chunk_loss=_chunk_loss,
    linears=models.Linears(same_input=(("wq", "wk", "wv"), ("w1", "w3")), rows=("wo", "w2")),
    pipeline=models.Pipelined(units, width=lambda args: args.dim),
    shared_sizes=shared_sizes,
)
models.register(SPEC)
