"""Mixed precision in a single process: compute in low-precision copies of the parameters.

The optimizer, checkpoints and gradient clipping see only the parameters. Within `computing_in_copies`, the
modules hold copies, newly cast from the parameters. The gradient of a copy is moved to its parameter as soon
as it is computed, in the parameter's dtype, so that microbatches accumulate without rounding. The results
equal FSDP2's bit for bit.

FSDP2 over one process does the same, but turns every parameter into a DTensor and casts each layer again in
backward, which costs 3 to 5 % of a step of the debug model on a CPU. The copies stay in memory (in bfloat16,
half of the parameters' bytes), while FSDP2 frees them after use; so GPUs use FSDP2.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_NAME = "compute_copies"


class _Copies:
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        copy_of = {p: nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in model.parameters()}
        self._parameters: list[Tensor] = list(copy_of)
        self._copies: list[Tensor] = list(copy_of.values())
        self._places = [
            (module, name, parameter, copy_of[parameter])
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        for parameter, copy in copy_of.items():
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(self._gradient_hook(parameter))

    @staticmethod
    def _gradient_hook(parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def move_gradient(copy: Tensor) -> None:
            assert copy.grad is not None
            grad, copy.grad = copy.grad.to(parameter.dtype), None
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad += grad

        return move_gradient

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._parameters)
        try:
            for module, name, _, copy in self._places:
                setattr(module, name, copy)
            yield
        finally:
            for module, name, parameter, _ in self._places:
                setattr(module, name, parameter)


def give_copies(model: nn.Module, dtype: torch.dtype) -> None:
    """Let `model` compute in copies of its parameters, which may still be on the meta device."""
    setattr(model, _NAME, dtype)


@contextmanager
def computing_in_copies(model: nn.Module) -> Iterator[None]:
    """The scope of forward and backward of a `model` with copies; does nothing for other models."""
    copies = getattr(model, _NAME, None)
    if isinstance(copies, torch.dtype):  # created here because allocation replaces meta parameters
        copies = _Copies(model, copies)
        setattr(model, _NAME, copies)
    if isinstance(copies, _Copies):
        with copies.in_place():
            yield
    else:
        yield
