"""Data loaders for tests."""

from octavo.data.build import build_source
from octavo.data.dataloader import DataLoader
from octavo.data.sample_source import SourceOptions
from octavo.tokenizer import build_tokenizer


def make_loader(
    dataset,
    tokenizer="octavo_bpe_2048",
    *,
    rank=0,
    ranks=1,
    batch=4,
    workers=1,
    seq_len=16,
    seed=1,
    **options,
):
    """The loader of `rank` for `dataset`; `options` are further fields of `SourceOptions`."""
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer)
    source = build_source(str(dataset), SourceOptions(tokenizer, seq_len, seed, **options))
    return DataLoader(source, local_batch_size=batch, dp_rank=rank, dp_degree=ranks, workers=workers)
