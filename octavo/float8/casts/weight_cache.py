"""The casts of one weight, reused for as long as they are those of its values.

Whoever casts a weight for later use stores the result here: `cast_weights_once` at the start of a step, and
an optimizer that casts the weights it has just updated. Whoever multiplies takes it from here. One rule says
whether stored casts are current: the weight is the same tensor at the same version.

A version cannot show everything. FSDP2 and fused optimizers write without advancing it, as does an edit
through `.data`, and compiled code does not look. So the casts are used only inside a `cast_weights_once`
scope, which promises that weights do not change; an optimizer that makes them promises that nothing else
writes to the weight between its step and the scope.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from octavo.float8.quantize import Casts


class WeightCache:
    """See the module's docstring. `active`: whether a scope allows the casts to be used.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.active = False
        self.casts: Casts | None = None
        self._weight: tuple[weakref.ref[Tensor], int] | None = None  # of which they are, and its version

    def store(self, weight: Tensor, casts: Casts) -> None:
        """Store the casts of the current values of `weight`."""
        self.casts = casts
        self._weight = weakref.ref(weight), weight._version

    def is_current(self, weight: Tensor) -> bool:
        """Whether the casts are those of the values of `weight`."""
        if self.casts is None or self._weight is None:
            return False
        stored, version = self._weight
        return stored() is weight and version == weight._version

    def get(self, weight: Tensor) -> Casts | None:
        """The casts, if they may be used and are current."""
        if self.active and (torch.compiler.is_compiling() or self.is_current(weight)):
            return self.casts
        return None

    def clear(self) -> None:
        self.active, self.casts, self._weight = False, None, None

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()
