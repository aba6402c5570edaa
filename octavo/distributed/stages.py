"""Splits a model into pipeline stages whose parameters keep their names.

A stage is a copy of the whole model on the meta device, without the modules of other stages. So code that
uses parameter names (initial weights, checkpoints, exports, filters) needs no special case for stages.
"""

import copy
from collections.abc import Iterable, Sequence

from torch import nn


def cut(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `model`, built on the meta device, with only the modules called `names`.

    A name is that of a child, or of an entry of a child `nn.ModuleDict` (`layers.3`). Other children become
    None; other entries are removed.
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
    """The modules of all stages of one process, under their names in the whole model.

    Only a container for parameters: it has no forward.
    """

    def __init__(self, stages: Sequence[nn.Module], numbers: Sequence[int]):
        super().__init__()
        self._depths: dict[str, int] = {}
        for stage, number in zip(stages, numbers, strict=True):
            assert not stage._parameters  # a parameter of the root would be in every stage
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
        """The number of the stage that holds the module or parameter called `name`."""
        return max((d for part, d in self._depths.items() if f"{name}.".startswith(f"{part}.")), default=0)
