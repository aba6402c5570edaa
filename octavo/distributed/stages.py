"""A model cut into pipeline stages, each a module whose parameters have the names that they have in the
whole.

A stage is a copy of the whole model, made while that has no memory yet, without the parts that others have.
So nothing that goes by names, such as initial weights, checkpoints, exports and filters, knows of stages.
"""

import copy
from collections.abc import Iterable, Sequence

from torch import nn


def cut(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `model`, built on the meta device, that has only the modules called `names`.

    A name is a child's, or one of an `nn.ModuleDict`'s that is a child (`layers.3`). Other children become
    None; other entries are gone.
    """
    stage, kept = copy.deepcopy(model), set(names)
    for name, child in list(stage.named_children()):
        if isinstance(child, nn.ModuleDict):
            for key in list(child):
                if f"{name}.{key}" not in kept:
                    del child[key]
        elif name not in kept:
            setattr(stage, name, None)
    return stage


class LocalStages(nn.Module):
    """All that one process has of a model, under the names of the whole: the modules of its stages, for what
    concerns parameters. It computes nothing.

    `depth` tells the stage of a module by its name.
    """

    def __init__(self, stages: Sequence[nn.Module], numbers: Sequence[int]):
        super().__init__()
        self._depths: dict[str, int] = {}
        for stage, number in zip(stages, numbers, strict=True):
            assert not stage._parameters  # they would be in every stage
            for name, child in stage.named_children():
                if not isinstance(child, nn.ModuleDict):
                    self._add(self, name, child, name, number)
                    continue
                if name not in self._modules:
                    self.add_module(name, nn.ModuleDict())
                for key, entry in child.items():
                    self._add(self._modules[name], key, entry, f"{name}.{key}", number)

    def _add(self, parent: nn.Module | None, key: str, module: nn.Module, name: str, number: int) -> None:
        assert parent is not None
        parent.add_module(key, module)
        self._depths[name] = number

    def depth(self, name: str) -> int:
        """The stage that the module or parameter called `name` is in."""
        return max((d for part, d in self._depths.items() if f"{name}.".startswith(f"{part}.")), default=0)
