"""The loss on text that is not trained on, measured during training without changing a bit of it.

Validation reads samples by number from a source of its own, forwards them without gradients, and leaves no
trace: no random number is drawn, no gradient or float8 scale is kept, weights that were gathered for it are
freed again. The samples are the same at every validation, on any number of ranks; where they do not fill the
last batch, its rest is read but not counted.

loss: nats per token, the mean over all labels, as in training. bits per byte: the bits that the model needs
for all labels, the ends of documents included, over the bytes of text that they stand for. It does not
depend on the tokenizer's vocabulary, so models with different ones can be compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError
from octavo.data import shard_format
from octavo.data.build import build_source
from octavo.data.corpus_files import BadRecords
from octavo.data.mixture import held_out
from octavo.data.sample_source import SampleSource, SourceOptions
from octavo.distributed.mesh import World
from octavo.metrics.logger import ValidationReport
from octavo.tokenizer import Tokenizer

IGNORED = -100  # a label that cross entropy passes over
_SEED = 0  # of the order: the same samples for every training.seed


class Validator:
    """Validates `model` on `batches` microbatches of each rank.

    Args:
        loss_sum: logits [B, S, V] and labels [B, S] -> the summed cross entropy, a scalar.
        byte_lengths: bytes of text of each id.
        samples: how many to count; the first ones of the source.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        samples: int,
        local_batch_size: int,
        world: World,
        byte_lengths: list[int],
        device: torch.device,
    ) -> None:
        self._source, self.samples, self._batch = source, samples, local_batch_size
        self._world, self._device = world, device
        self._bytes_V = torch.tensor(byte_lengths, dtype=torch.int64, device=device)
        self.description = f"{source.description}; {samples:,} samples each time"

    def run(
        self,
        model: nn.Module,
        loss_sum: Callable[[Tensor, Tensor], Tensor],
        forward: Callable[[Tensor], Tensor | None] | None = None,
    ) -> ValidationReport:
        """Measure; a collective call of all ranks. `forward` computes the logits, or None where another
        process has them; by default the model does.
        """
        start = time.perf_counter()
        # float64 sums: the order in which ranks and batches are added must not show
        totals = torch.zeros(3, dtype=torch.float64, device=self._device)  # nats, tokens, bytes
        self._source.load_state_dict({})
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for first in range(0, self.samples, self._batch * self._world.layout.data):
                totals += self._batch_totals(
                    first + self._world.data_rank * self._batch, forward or model, loss_sum
                )
        model.train(was_training)
        _free_gathered(model)
        nats, tokens, text_bytes = self._world.sum(totals).tolist()
        return ValidationReport(
            loss=nats / tokens,
            bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None,
            tokens=int(tokens),
            seconds=time.perf_counter() - start,
        )

    def _batch_totals(
        self,
        first: int,
        forward: Callable[[Tensor], Tensor | None],
        loss_sum: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        samples = self._source.read(first, self._batch).to(self._device)
        tokens_BS, labels_BS = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        labels_BS[max(0, self.samples - first) :] = IGNORED
        labels_BS = self._world.local_labels(labels_BS)
        logits = forward(tokens_BS)
        if logits is None:
            return torch.zeros(3, dtype=torch.float64, device=self._device)
        nats = loss_sum(logits, labels_BS).double()
        counted = labels_BS[labels_BS != IGNORED]
        return torch.stack([nats, nats.new_tensor(counted.numel()), self._bytes_V[counted].sum().double()])


def _free_gathered(model: nn.Module) -> None:
    """What a forward without its backward leaves gathered is sharded again."""
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
    """The validator that `[validation]` asks for; None where it is off.

    `training_source` has held out its share, where there is one to hold out.

    Raises:
        ConfigError: there is no text to validate on, or no end to it.
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
        byte_lengths=tokenizer.byte_lengths(),
        device=device,
    )


def _samples(job: JobConfig, source: SampleSource, per_step: int) -> int:
    there: int | None = getattr(source, "samples", None)
    steps = job.validation.steps
    if steps == -1 and there is None:
        raise ConfigError(
            "validation.steps = -1: a stream or a mixture to validate on has no end; set validation.steps"
        )
    if steps == -1 or there is None:
        return there if there is not None else steps * per_step
    return min(there, steps * per_step)
