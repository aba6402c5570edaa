"""What all shipped families give the trainer, as one `ModelSpec` each."""

from dataclasses import replace
from functools import partial

from torch import nn

from octavo.config import ConfigError
from octavo.families import Family
from octavo.families.model_args import ModelArgs
from octavo.models.decode import Decoder
from octavo.models.hf_config import from_config, to_config
from octavo.models.hf_state_dict import from_hf, redundant, to_hf
from octavo.models.loss import ChunkedLoss
from octavo.models.model_spec import HuggingFace, Linears, ModelSpec, Pipelined
from octavo.models.parallelize import parallelize
from octavo.models.transformer import Transformer
from octavo.preflight import sizes


def configure(args: ModelArgs, vocab_size: int, seq_len: int) -> ModelArgs:
    """`args` for a tokenizer of `vocab_size` tokens and sequences of `seq_len` tokens.

    Raises `ConfigError` if the tokenizer has more tokens than the model has embeddings.
    """
    if args.vocab_size and vocab_size > args.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size:,} tokens, but this model has {args.vocab_size:,} embeddings; "
            "set model.hf_assets_path to the model's own tokenizer"
        )
    return replace(args, vocab_size=args.vocab_size or vocab_size, max_seq_len=seq_len)


def flops_per_token(args: ModelArgs, model: nn.Module, seq_len: int) -> float:
    """Model FLOPs per token of forward and backward: 6 per matrix parameter that serves the token, and
    12 L H E S for attention (E: the mean width of a key and a value).

    The convention of PaLM's appendix B (arXiv:2204.02311), which published MFU figures use: attention counts
    in full although half of it is masked, recomputation does not count, and neither does an embedding unless
    it is tied to the output projection.
    """
    parameters = sum(p.numel() for p in model.parameters())
    if not args.tie_embeddings:
        parameters -= args.vocab_size * args.dim
    if args.moe is not None:
        parameters -= (args.n_layers - args.moe.first_dense) * args.moe.idle(args.dim)
    widths = args.head_width + args.value_width  # of the products q k^T and p v
    return 6.0 * parameters + 6.0 * args.n_layers * args.n_heads * widths * seq_len


def layer_products(args: ModelArgs, seq_len: int) -> tuple[str, list[tuple[str, float]]]:
    """The layers' prefix, and one layer's matrix products in order of forward, with FLOPs per token; of a
    layer with experts, if the model has such.

    Attention counts as in `flops_per_token`.
    """
    products = _attention_products(args, seq_len)
    moe = args.moe
    feeds = {"feed_forward": args.hidden_dim} if moe is None else {"moe.experts": moe.top_k * moe.hidden_dim}
    if moe is not None and moe.shared_dim:
        feeds["moe.shared"] = moe.shared_dim
    for feed, width in feeds.items():
        products += [(f"{feed}.{name}", 2.0 * args.dim * width) for name in ("w1", "w3", "w2")]
    return "layers.", products


def _attention_products(args: ModelArgs, seq_len: int) -> list[tuple[str, float]]:
    queries, groups = args.n_heads * args.head_width, args.n_kv_heads * args.head_width
    values, latent = args.n_heads * args.value_width, args.latent
    core = ("core", 2.0 * (queries + values) * seq_len)
    if latent is None:
        shapes = {"wq": (args.dim, queries), "wk": (args.dim, groups), "wv": (args.dim, groups)}
    else:
        made = args.n_heads * (latent.nope_dim + latent.value_dim)
        shapes = {"wkv_a": (args.dim, latent.kv_rank + latent.rope_dim), "wkv_b": (latent.kv_rank, made)}
        if latent.q_rank:
            shapes = {"wq_a": (args.dim, latent.q_rank), "wq_b": (latent.q_rank, queries), **shapes}
        else:
            shapes = {"wq": (args.dim, queries), **shapes}
    products = [(name, 2.0 * rows * columns) for name, (rows, columns) in shapes.items()]
    products += [core, ("wo", 2.0 * values * args.dim)]
    return [(f"attention.{name}", flops) for name, flops in products]


def _chunk_loss(model: nn.Module, loss: ChunkedLoss) -> None:
    assert isinstance(model, Transformer)
    model.chunk_loss(loss)


def spec_of(family: Family) -> ModelSpec:
    """The entry of a shipped family in the model registry."""
    stored = HuggingFace(
        tuple(stored.model_type for stored in family.hub_formats),
        to_names=partial(to_hf, family),
        from_names=partial(from_hf, family),
        to_config=partial(to_config, family),
        from_config=partial(from_config, family),
        redundant=partial(redundant, family),
    )
    return ModelSpec(
        name=family.name,
        flavors=family.flavors,
        configure=configure,
        build=Transformer,
        parallelize=parallelize,
        flops_per_token=flops_per_token,
        layer_products=layer_products,
        mask_documents=lambda args, document_end: replace(args, document_end=document_end),
        hugging_face=stored,
        decoder=Decoder,
        fuses=True,
        casts_inputs=True,
        chunk_loss=_chunk_loss,
        linears=Linears(same_input=(("wq", "wk", "wv"), ("w1", "w3")), rows=("wo", "w2")),
        pipeline=Pipelined(sizes.units, width=lambda args: args.dim),
        shared_sizes=sizes.shared_sizes,
    )
