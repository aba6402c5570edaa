"""The computation of a training step: microbatches in, loss and gradients out.

A `TrainStep` reads and writes no file, logs nothing and knows no optimizer. The trainer, `octavo estimate`
and benchmarks run the same one; everything that watches a step is a hook (`hooks.py`).

The loss of a microbatch is its sum over tokens divided by the number of tokens in the global batch, or of
those whose label is not IGNORED. So the gradients of all microbatches and processes are summed, and results
do not depend on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo import models
from octavo.config import JobConfig
from octavo.config.needs import casts_weights_again, ignores_document_starts
from octavo.config.parallel_dims import ParallelDims
from octavo.config.schema import Training
from octavo.data.labels import IGNORED
from octavo.distributed.ddp import reduce_gradients_now
from octavo.distributed.mesh import World
from octavo.distributed.mixed_precision import computing_in_copies
from octavo.distributed.pipeline_parallel import Activations, Pipeline
from octavo.distributed.tensor_parallel import loss_context
from octavo.preflight.pipeline_plan import PipelinePlan
from octavo.train import quantization
from octavo.train.build_model import Built


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross entropy in float32, summed over the tokens; a scalar. Logits may be sharded by vocabulary."""
    loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="sum")
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def ignore(*_: object) -> None:
    """The callback that does nothing."""


@dataclass(frozen=True)
class TrainStep:
    """Computes the loss of `model` and its gradients, under every layout.

    model: this process's part of the model. microbatches: of a step, on this process. global_tokens: of a
    step, on all processes. cross_entropy: logits [B, S, V] and labels [B, S] -> the summed loss, a scalar.
    counts_labels: whether some labels may be IGNORED, so that those that are not are counted before the first
    forward; the microbatches of a step are then read at once.
    chunked: whether the model computes its loss itself, given the labels, so that whole logits never exist.
    cast_weights_once: whether float8 weights are cast once for all microbatches. pipeline: the schedule of
    this process's stages, None without pipeline parallelism. progress: called after each microbatch, and in a
    pipeline after each forward and backward of a stage.
    """

    model: nn.Module
    world: World
    device: torch.device
    microbatches: int
    global_tokens: int
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum
    counts_labels: bool = False
    chunked: bool = False
    cast_weights_once: bool = False
    pipeline: Pipeline | None = None
    progress: Callable[[], None] = ignore

    def gradients(
        self, batches: Iterable[tuple[Tensor, Tensor]], on_loss: Callable[[Tensor], None] = ignore
    ) -> Tensor:
        """Add the gradients of `batches`, as many as `microbatches`, to those of the model's parameters.

        Returns this process's share of the step's loss, a scalar. `on_loss` is called with the loss of each
        microbatch, which is part of that sum.
        """
        tokens: int | Tensor = self.global_tokens
        if self.counts_labels:
            batches = list(batches)
            tokens = self._counted_tokens([labels_BS for _, labels_BS in batches])

        def share(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
            loss = self.cross_entropy(logits_BSV, labels_BS) / tokens
            on_loss(loss)
            return loss

        total = torch.zeros((), device=self.device)
        with self.computing(), quantization.cast_weights_in_step(self.model, enabled=self.cast_weights_once):
            for number, (tokens_BS, labels_BS) in enumerate(batches, start=1):
                reduce_gradients_now(self.model, last=number == self.microbatches)
                if self.pipeline is not None:
                    total += self.pipeline.gradients(tokens_BS, labels_BS, share)
                else:
                    loss = self.loss(tokens_BS, labels_BS) / tokens
                    on_loss(loss)
                    loss.backward()
                    total += loss.detach()
                self.progress()
        return total

    def _counted_tokens(self, labels: Sequence[Tensor]) -> Tensor:
        """Of a step, on all processes: the tokens whose label is not IGNORED, at least one; a float32 scalar.

        All stages of a pipeline have the same labels, so the sums give their share.
        """
        counted = torch.stack([(labels_BS != IGNORED).sum() for labels_BS in labels]).sum()
        every = sum(labels_BS.numel() for labels_BS in labels)
        sums = self.world.sum(torch.stack([counted, torch.full_like(counted, every)]).double())
        return (self.global_tokens * sums[0] / sums[1]).clamp(min=1).float()

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """The loss of a whole model, summed over tokens; a scalar. Called in `computing`."""
        if self.chunked:
            loss: Tensor = self.model(tokens_BS, labels_BS=labels_BS)
            return loss
        return self.cross_entropy(self.model(tokens_BS), labels_BS)

    def evaluate(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor | None:
        """`loss` for a batch of any shape, without gradients, also in a pipeline; None if another process has
        the last stage. Called in `computing`.
        """
        if self.pipeline is None:
            return self.loss(tokens_BS, labels_BS)
        logits_BSV = self.pipeline.forward(tokens_BS)
        return None if logits_BSV is None else self.cross_entropy(logits_BSV, labels_BS)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The scope of forward and backward."""
        with computing_in_copies(self.model), loss_context(parallel=self.world.loss_parallel):
            yield


def global_batch_size(training: Training, layout: ParallelDims) -> int:
    """Samples of a step: as configured, at least one local batch of each process that reads its own."""
    return max(training.global_batch_size, training.local_batch_size * layout.data)


def build_train_step(
    job: JobConfig,
    built: Built,
    *,
    plan: PipelinePlan | None,
    world: World,
    device: torch.device,
    progress: Callable[[], None] = ignore,
) -> TrainStep:
    """The step of the model `built`, split as `plan` says."""
    training = job.training
    samples = global_batch_size(training, world.layout)
    compiled = job.compile.enable and "loss" in job.compile.components
    return TrainStep(
        model=built.model,
        world=world,
        device=device,
        microbatches=samples // (training.local_batch_size * world.layout.data),
        global_tokens=samples * training.seq_len,
        cross_entropy=torch.compile(cross_entropy_sum) if compiled else cross_entropy_sum,
        counts_labels=ignores_document_starts(training),
        chunked=training.loss_chunk_tokens is not None,
        cast_weights_once=job.float8.cast_weights_once and casts_weights_again(job, world.size),
        pipeline=None if plan is None else _pipeline(job, built, plan, world, device, progress),
        progress=progress,
    )


def _pipeline(
    job: JobConfig,
    built: Built,
    plan: PipelinePlan,
    world: World,
    device: torch.device,
    progress: Callable[[], None],
) -> Pipeline:
    """The schedule of this process's stages."""
    spec, layout, training = models.get(job.model.name), world.layout, job.training
    assert spec.pipeline is not None
    assert world.pipeline is not None
    shared = layout.context * layout.tensor
    return Pipeline(
        built.stages,
        plan,
        world.pipeline,
        Activations(spec.pipeline.width(built.args), shared, built.param_dtype),
        tokens_shape=(training.local_batch_size, training.seq_len),
        device=device,
        progress=progress,
    )
