"""Where the first non-finite number of a step arises: run the step again and look at everything.

A training step does not look: to check every tensor of every layer would cost more than the layers. So when a
step turns out bad, its microbatches run once more, with hooks on every module, before anything else is
changed. In the order of computation: a weight that is not finite; the first input or output of a module in
forward; the loss; the first gradient of an output in backward; the gradient of a weight. A module is named by
its full name; an input that is the first bad value was made by something between modules, such as attention's
softmax.

All of it is eager, also where training is compiled: a compiled layer has no hooks and fuses what would be
looked at. Processes look at their own data and compare what they found; the earliest counts.
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

_WEIGHT, _FORWARD, _LOSS, _BACKWARD, _GRADIENT = range(5)  # in the order in which a step makes them


@dataclass(frozen=True, order=True)
class NonFinite:
    """The first non-finite tensor that one process found: when (phase, stage of a pipeline, place in it), and
    what it is.
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
            name = plain_name(raw + ".").rstrip(".") or "the model"
            self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def look(self, phase: int, tensor: object, what: str, name: str = "") -> None:
        """Note `what` if nothing was found before and `tensor`, of the module or weight called `name`, has a
        non-finite number.
        """
        self._place += 1
        if self.first is None and isinstance(tensor, Tensor) and not _finite(tensor):
            stage = self._depth(name) * (-1 if phase in (_BACKWARD, _GRADIENT) else 1)
            self.first = NonFinite(phase, stage, self._place, self._rank, what)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for tensor in inputs:
                self.look(_FORWARD, tensor, f"the input of {name} in forward", name)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            self.look(_FORWARD, output, f"the activation that {name} puts out in forward", name)
            if isinstance(output, Tensor) and output.requires_grad:
                what = f"the gradient of {name}'s output in backward"
                output.register_hook(lambda grad: self.look(_BACKWARD, grad, what, name))

        return hook


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(plain_name(name), parameter) for name, parameter in model.named_parameters()]


@torch.no_grad()
def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return not local.is_floating_point() or bool(torch.isfinite(local).all())


def first_non_finite(model: nn.Module, run: Callable[[Callable[[Tensor], None]], object]) -> str:
    """Name the layer and operand where the first non-finite number of a step arises; the same on every rank.

    Args:
        model: as trained; its gradients must be gone, and are left as `run` leaves them.
        run: runs the step's microbatches forward and backward, and hands each loss to the function it gets.

    Returns:
        In words; also when nothing was found, which is itself a finding: the step does not repeat.
    """
    rank = dist.get_rank()
    recorder = _Recorder(model, rank)
    try:
        for name, parameter in _weights(model):
            recorder.look(_WEIGHT, parameter, f"the weight {name}, before the step", name)
        with torch.compiler.set_stance("force_eager"):
            run(lambda loss: recorder.look(_LOSS, loss, "the loss, from finite outputs of the model"))
        for name, parameter in reversed(_weights(model)):
            recorder.look(_GRADIENT, parameter.grad, f"the gradient of the weight {name}", name)
    finally:
        recorder.remove()
    found: list[NonFinite | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, recorder.first)
    findings = sorted(finding for finding in found if finding is not None)
    if findings:
        return f"the first number that is not finite is in {findings[0]}"
    return (
        "run a second time, the same batch gave finite numbers in every layer: "
        "the step does not repeat, which points to the hardware or, under compile, to the compiled code"
    )
