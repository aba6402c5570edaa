"""Locates the first non-finite number of a step by running the step again with checks on every module.

Checking every tensor in every training step would be too expensive. So when a step turns out bad, its
microbatches run once more, with hooks on every module, before any state changes. Checked, in the order of
computation: weights; inputs and outputs of modules in forward; the loss; gradients of outputs in backward;
gradients of weights. Modules are reported by their full name. If the first bad value is an input, it was
computed between modules, for example by attention's softmax.

The rerun is eager even if training is compiled, because a compiled layer runs no hooks and fuses the tensors
to be checked. Each process checks its own data; the earliest finding over all processes is reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.distributed.stages import LocalStages
from octavo.models.init import plain_name

_WEIGHT, _FORWARD, _LOSS, _BACKWARD, _GRADIENT = range(5)  # in the order of a step's computation


@dataclass(frozen=True, order=True)
class NonFinite:
    """The first non-finite tensor of one process. Ordered by phase, pipeline stage and place in the stage;
    `what` describes the tensor.
    """

    phase: int
    stage: int
    place: int
    rank: int
    what: str

    def __str__(self) -> str:
        everywhere = self.phase == _WEIGHT
        return self.what if everywhere else f"{self.what}, on rank {self.rank}"


class _Recorder:
    """Hooks on every module of a model; keeps the first finding of each phase."""

    def __init__(self, model: nn.Module, rank: int):
        self._rank = rank
        self._depth = model.depth if isinstance(model, LocalStages) else lambda name: 0
        self._place = 0
        self.first: NonFinite | None = None
        self._handles = []
        for raw, module in model.named_modules():
            name = plain_name(raw) or "the model"
            self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self, phase: int, tensor: object, what: str, name: str = "") -> None:
        """Record `what` if `tensor`, of the module or weight `name`, is the first that is not finite."""
        self._place += 1
        if self.first is None and isinstance(tensor, Tensor) and not _finite(tensor):
            stage = self._depth(name) * (-1 if phase in (_BACKWARD, _GRADIENT) else 1)
            self.first = NonFinite(phase, stage, self._place, self._rank, what)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for tensor in inputs:
                self.check(_FORWARD, tensor, f"the input of {name} in forward", name)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            self.check(_FORWARD, output, f"the output of {name} in forward", name)
            if isinstance(output, Tensor) and output.requires_grad:
                what = f"the gradient of {name}'s output in backward"
                output.register_hook(lambda grad: self.check(_BACKWARD, grad, what, name))

        return hook


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(plain_name(name), parameter) for name, parameter in model.named_parameters()]


@torch.no_grad()
def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return not local.is_floating_point() or bool(torch.isfinite(local).all())


def first_non_finite(model: nn.Module, run: Callable[[Callable[[Tensor], None]], object]) -> str:
    """Describe the first non-finite tensor of a step; a collective call with the same result on every rank.

    Args:
        model: the trained model, with its gradients cleared. They are left as `run` leaves them.
        run: runs the step's microbatches forward and backward, and calls its argument with each loss.

    Returns:
        A clause for an error message. If nothing is found, it says that the step is not reproducible.
    """
    rank = dist.get_rank()
    recorder = _Recorder(model, rank)
    try:
        for name, parameter in _weights(model):
            recorder.check(_WEIGHT, parameter, f"the weight {name}, before the step", name)
        with torch.compiler.set_stance("force_eager"):
            run(lambda loss: recorder.check(_LOSS, loss, "the loss, from finite outputs of the model"))
        for name, parameter in reversed(_weights(model)):
            recorder.check(_GRADIENT, parameter.grad, f"the gradient of the weight {name}", name)
    finally:
        recorder.remove()
    gathered: list[NonFinite | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, recorder.first)
    findings = sorted(finding for finding in gathered if finding is not None)
    if findings:
        return f"the first number that is not finite is in {findings[0]}"
    return (
        "when run again, the same batch gave finite numbers in every layer: "
        "the step is not reproducible, which points to the hardware or, under compile, to the compiled code"
    )
