"""Computing in another dtype than parameters are kept in, in a process that has all of them: in copies.

The optimizer, checkpoints and the clipping of gradients see the parameters alone. In the scope of
`computing_in_copies` the modules have the copies in their places, cast anew from the parameters. The gradient
of a copy goes to its parameter as soon as it is there, in the parameter's dtype, so that those of several
microbatches add up unrounded. The numbers are FSDP2's, bit for bit.

FSDP2 over one process would do it too, but for nothing but the cast makes every parameter a DTensor, of which
clipping and the optimizer ask one by one where they are, and casts and copies each layer again for backward:
3 to 5 % of a step of the debug model on a CPU. The copies stay in memory, in bfloat16 half of the parameters'
bytes, where FSDP2 frees a layer's after use; so a GPU, for which memory counts, takes FSDP2.
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
                copy.register_post_accumulate_grad_hook(self._handing_on_to(parameter))

    @staticmethod
    def _handing_on_to(parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def hand_on(copy: Tensor) -> None:
            assert copy.grad is not None
            grad, copy.grad = copy.grad.to(parameter.dtype), None
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad += grad

        return hand_on

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
    """Let `model` compute in copies of its parameters, which need not have memory yet."""
    setattr(model, _NAME, dtype)


@contextmanager
def computing_in_copies(model: nn.Module) -> Iterator[None]:
    """The scope of forwards and backwards of a `model` that was given copies; does nothing for another."""
    copies = getattr(model, _NAME, None)
    if isinstance(copies, torch.dtype):  # only now: parameters that got memory since are new objects
        copies = _Copies(model, copies)
        setattr(model, _NAME, copies)
    if isinstance(copies, _Copies):
        with copies.in_place():
            yield
    else:
        yield
