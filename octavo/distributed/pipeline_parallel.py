"""Pipeline parallelism: runs microbatches through stages on different processes, by a schedule.

Schedules and communication are torch's (`torch.distributed.pipelining`). This module adds three things:
shapes of activations are given in advance, so torch need not run a forward pass to infer them; the trainer
has already divided the loss by the number of tokens, so gradients of microbatches are summed; and validation
runs forward through the same stages with batches of any shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, get_schedule_class

from octavo.preflight.pipeline_plan import PipelinePlan

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Activations:
    """The tensors sent between stages: `[B, S / shared, width]` of `dtype`. shared: the number of processes
    that share a sequence.
    """

    width: int
    shared: int
    dtype: torch.dtype

    def empty(self, tokens_shape: Sequence[int], device: torch.device | str) -> Tensor:
        """An uninitialized tensor for a batch of tokens of shape [B, S]."""
        batch, length = tokens_shape
        return torch.empty(batch, length // self.shared, self.width, dtype=self.dtype, device=device)


class _Stage(PipelineStage):
    """A stage that calls `progress` after each forward and backward."""

    progress: Callable[[], None] = staticmethod(lambda: None)

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward_one_chunk(*args, **kwargs)
        self.progress()
        return result

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        result = super().backward_one_chunk(*args, **kwargs)
        self.progress()
        return result

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        """Disabled: before torch 2.12 it requires logits to have the shape of activations."""


class Pipeline:
    """This process's stages of a model and their schedule.

    Args:
        modules: its parallelised stages, in the order of `plan.stages_of` for this process.
        mesh: the processes that hold the stages.
        tokens_shape: of a local batch, [B, S].
        progress: called after each forward or backward of a microbatch.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        plan: PipelinePlan,
        mesh: DeviceMesh,
        activations: Activations,
        *,
        tokens_shape: tuple[int, int],
        device: torch.device,
        progress: Callable[[], None],
    ) -> None:
        self._plan, self._activations, self._device = plan, activations, device
        self._group = mesh.get_group()
        numbers = plan.stages_of(mesh.get_local_rank())
        self._modules = dict(zip(numbers, modules, strict=True))
        self._last = len(plan.stages) - 1
        self._loss: Loss = _no_loss
        batch = tokens_shape[0] // plan.microbatches, tokens_shape[1]
        self._stages = [self._stage(number, batch, progress) for number in numbers]
        self._schedule = self._make_schedule()

    def _stage(self, number: int, batch: tuple[int, int], progress: Callable[[], None]) -> _Stage:
        activations = self._activations.empty(batch, "meta").requires_grad_()
        tokens = torch.empty(batch, dtype=torch.int64, device="meta")
        stage = _Stage(
            self._modules[number],
            number,
            len(self._plan.stages),
            self._device,
            input_args=(tokens if number == 0 else activations,),
            output_args=(activations,),  # unused for the last stage, whose output is not sent
            group=self._group,
        )
        stage.progress = progress
        return stage

    def _make_schedule(self) -> Any:
        settings: dict[str, Any] = {
            "n_microbatches": self._plan.microbatches,
            "loss_fn": lambda logits, labels: self._loss(logits, labels),
            "scale_grads": False,
        }
        if self._plan.csv is not None:
            schedule = _PipelineScheduleRuntime(list(self._stages), **settings)
            schedule._load_csv(str(self._plan.csv))
            return schedule
        kind = get_schedule_class(self._plan.schedule)
        one = len(self._stages) == 1 and self._plan.schedule in ("GPipe", "1F1B")
        return kind(self._stages[0] if one else list(self._stages), **settings)

    @property
    def has_last(self) -> bool:
        """Whether this process has the last stage, which computes the loss."""
        return self._last in self._modules

    def gradients(self, tokens_BS: Tensor, labels_BS: Tensor, loss: Loss) -> Tensor:
        """Accumulate the gradients of a local batch. Returns the summed loss of its microbatches, a scalar; 0
        if another process has the last stage.

        `loss` takes the logits and labels of a microbatch.
        """
        self._loss = loss
        losses: list[Tensor] = []
        first = (tokens_BS,) if 0 in self._modules else ()
        last = {"target": labels_BS, "losses": losses} if self.has_last else {}
        try:
            self._schedule.step(*first, **last, return_outputs=False, tokens_BS=tokens_BS)
        finally:
            self._loss = _no_loss
        total = torch.zeros((), device=self._device)
        return total + torch.stack(losses).detach().sum() if losses else total

    @torch.no_grad()
    def forward(self, tokens_BS: Tensor) -> Tensor | None:
        """The logits of a batch of any shape; None if another process has the last stage."""
        h: Tensor | None = None
        for number, module in sorted(self._modules.items()):
            if number == 0:
                h = tokens_BS
            elif number - 1 not in self._modules:
                h = self._activations.empty(tokens_BS.shape, self._device)
                dist.recv(h, group=self._group, group_src=self._plan.process_of[number - 1])
            assert h is not None
            h = module(h, tokens_BS=tokens_BS)
            if number < self._last and number + 1 not in self._modules:
                assert h is not None
                dist.send(h.contiguous(), group=self._group, group_dst=self._plan.process_of[number + 1])
        return h if self.has_last else None


def _no_loss(logits: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("a schedule asks for a loss outside of a step")


def over_stages(norm: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The gradient norm over all stages, given the `norm` over this process's stages."""
    if mesh is None:
        return norm
    square = norm.double() ** 2
    dist.all_reduce(square, group=mesh.get_group())
    return square.sqrt().to(norm.dtype)
