"""Builds the training data of a job, in this process's share."""

import torch

from octavo.config import JobConfig
from octavo.config.needs import ignores_document_starts
from octavo.config.schema import Training
from octavo.data.build import build_source
from octavo.data.corpus_files import BadRecords
from octavo.data.dataloader import DataLoader
from octavo.data.sample_source import SourceOptions
from octavo.distributed.mesh import World
from octavo.tokenizer import Tokenizer


def build_data(
    job: JobConfig, tokenizer: Tokenizer, *, world: World, device: torch.device, bad: BadRecords
) -> DataLoader:
    """The loader of this process's batches of `training.dataset`, without what validation holds out."""
    training, rank, ranks = job.training, world.data_rank, world.layout.data
    options = SourceOptions(
        tokenizer=tokenizer,
        seq_len=training.seq_len,
        seed=training.seed if training.data_seed is None else training.data_seed,
        dataset_path=training.dataset_path,
        held_out_fraction=job.validation.fraction,
        bad=bad,
        verify=(rank, ranks) if training.verify_data else None,
    )
    return DataLoader(
        build_source(training.dataset, options),
        local_batch_size=training.local_batch_size,
        dp_rank=rank,
        dp_degree=ranks,
        workers=training.num_workers,
        pin_memory=device.type == "cuda",
        document_end=ignored_end(training, tokenizer),
    )


def ignored_end(training: Training, tokenizer: Tokenizer) -> int | None:
    """The id after which labels are left out of the loss, or None."""
    return tokenizer.eos_id if ignores_document_starts(training) else None
