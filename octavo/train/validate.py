"""Measures the loss on held-out text during training, without changing training by a single bit.

Validation reads samples by index from a source of its own and runs forward without gradients. It draws no
random number, keeps no gradient or float8 scale, and frees gathered weights again. The samples are the same
at every validation, on any number of ranks. Samples that pad the last batch are read but not counted.

loss: nats per token, the mean over the labels that training counts. bits per byte: the bits that the model
needs for those labels, including ends of documents, divided by the bytes of their text. It does not depend
on the vocabulary, so models with different tokenizers can be compared. It is not reported where the ids do
not tell the bytes of their text and nothing else does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.build import build_source
from octavo.data.corpus_files import BadRecords
from octavo.data.labels import IGNORED, split_samples
from octavo.data.mixture import held_out
from octavo.data.sample_source import SampleSource, SourceOptions
from octavo.distributed.mesh import World
from octavo.metrics.logger import ValidationReport
from octavo.tokenizer import Tokenizer
from octavo.train.build_data import ignored_end
from octavo.train.step import TrainStep

_SEED = 0  # of the order; samples must not depend on training.seed


class Validator:
    """Measures the loss on the first `samples` samples of `source`.

    Args:
        byte_lengths: number of bytes of each token id; zeros where they are unknown.
        document_end: labels that follow this id are not counted.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        samples: int,
        local_batch_size: int,
        world: World,
        byte_lengths: Sequence[float],
        device: torch.device,
        document_end: int | None = None,
    ) -> None:
        self._document_end = document_end
        self._source, self.samples, self._batch = source, samples, local_batch_size
        self._world, self._device = world, device
        self._bytes_V = torch.tensor(byte_lengths, dtype=torch.float64, device=device)
        self.description = f"{source.description}; {samples:,} samples each time"

    def run(self, step: TrainStep) -> ValidationReport:
        """Measure the loss of the model of `step`; a collective call of all ranks."""
        start = time.perf_counter()
        # float64: the result must not depend on the order of summation
        totals = torch.zeros(3, dtype=torch.float64, device=self._device)  # nats, tokens, bytes
        self._source.load_state_dict({})
        was_training = step.model.training
        step.model.eval()
        with step.computing(), torch.no_grad():
            for first in range(0, self.samples, self._batch * self._world.layout.data):
                totals += self._batch_totals(first + self._world.data_rank * self._batch, step)
        step.model.train(was_training)
        _free_gathered(step.model)
        nats, tokens, text_bytes = self._world.sum(totals).tolist()
        return ValidationReport(
            loss=nats / tokens,
            bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None,
            tokens=int(tokens),
            seconds=time.perf_counter() - start,
        )

    def _batch_totals(self, first: int, step: TrainStep) -> Tensor:
        samples = self._source.read(first, self._batch).to(self._device)
        tokens_BS, labels_BS = split_samples(samples, self._document_end)
        labels_BS[max(0, self.samples - first) :] = IGNORED
        labels_BS = self._world.local_labels(labels_BS)
        loss = step.evaluate(tokens_BS, labels_BS)
        if loss is None:
            return torch.zeros(3, dtype=torch.float64, device=self._device)
        nats, counted = loss.double(), labels_BS[labels_BS != IGNORED]
        return torch.stack([nats, nats.new_tensor(counted.numel()), self._bytes_V[counted].sum()])


def _free_gathered(model: nn.Module) -> None:
    """Reshard weights that a forward without a backward leaves gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def build_validator(
    job: JobConfig,
    tokenizer: Tokenizer,
    training_source: SampleSource,
    *,
    world: World,
    device: torch.device,
    bad: BadRecords | None = None,
) -> Validator | None:
    """The validator for `[validation]`, or None if it is disabled.

    training_source: must already exclude its held-out share if `validation.fraction` is set.

    Raises:
        ConfigError: there is no validation text, or it is endless and `validation.steps` is not set.
    """
    settings, training = job.validation, job.training
    if not settings.enable:
        return None
    if settings.dataset is None and settings.fraction:
        source = held_out(training_source, seed=_SEED)
    else:
        own_split = settings.dataset is None
        options = SourceOptions(
            tokenizer=tokenizer,
            seq_len=settings.seq_len or training.seq_len,
            seed=_SEED,
            dataset_path=training.dataset_path if own_split else settings.dataset_path,
            split=shard_format.VALIDATION if own_split else shard_format.TRAIN,
            bad=bad,
            verify=(world.data_rank, world.layout.data) if training.verify_data else None,
        )
        source = build_source(settings.dataset or training.dataset, options)
    batch = settings.local_batch_size or training.local_batch_size
    return Validator(
        source,
        samples=_samples(job, source, batch * world.layout.data),
        local_batch_size=batch,
        world=world,
        byte_lengths=_byte_lengths(tokenizer, source),
        device=device,
        document_end=ignored_end(training, tokenizer),
    )


def _byte_lengths(tokenizer: Tokenizer, source: SampleSource) -> Sequence[float]:
    """Of each id: its own, or the mean over the text if the vocabulary does not tell, or 0: unknown."""
    mean: float | None = getattr(source, "bytes_per_token", None)
    return tokenizer.byte_lengths() or [mean or 0.0] * tokenizer.vocab_size


def _samples(job: JobConfig, source: SampleSource, per_step: int) -> int:
    available: int | None = getattr(source, "samples", None)
    steps = job.validation.steps
    if steps == -1 and available is None:
        raise ConfigError(
            "validation.steps = -1: a stream or a mixture to validate on has no end; set validation.steps"
        )
    if steps == -1 or available is None:
        return available if available is not None else steps * per_step
    return min(available, steps * per_step)
