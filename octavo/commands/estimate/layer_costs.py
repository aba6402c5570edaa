"""A model of many equal layers, told from two traces with few of them.

A step takes as long to trace as the model has layers, and most are alike: with one more, each moment of the
step has the same bytes more, the layers call the same products more, and so on. So a stage of K layers is
traced with 4 and with 5, and what the fifth added is added K - 4 times.

Memory grows by a different amount at each moment (parameters at all, activations until their layer's
backward, gradients after it), and the highest moment of a short model need not be that of a long one. So the
step is cut at each layer's forward and backward, and each piece is continued on its own. The first and the
last two layers' are those of any model. What layers in between reach lies between these, since it grows by
the same amount from layer to layer. Two, because FSDP2 gathers a layer ahead. Tests compare with traces of
whole models.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from octavo.commands.estimate.memory_tracker import Log, MemoryTracker, Place
from octavo.commands.estimate.microbatches import Stretched
from octavo.commands.estimate.operations import Counts
from octavo.config import JobConfig
from octavo.config.pipeline_plan import PipelinePlan

KEPT = 4
"""Layers of a stage that the shorter trace has: two edges of two layers."""
_WORTH = 6
"""Layers that must be left out for two traces to take less than one."""


def alike(job: JobConfig) -> bool:
    """Whether nothing in `job` is for some layers only."""
    ac, float8 = job.activation_checkpoint, job.float8
    if ac.mode == "selective" and ac.selective_ac_option != "op":
        return False
    if "float8" not in job.model.converters:
        return True
    named = any(part.startswith("layers") or part[:1].isdigit() for part in float8.filter_fqns)
    return not named and not float8.layer_recipes


def left_out(job: JobConfig, args: Any, plan: PipelinePlan | None) -> int:
    """How many layers the shorter trace can leave out of each stage; 0 where layers are not known to be
    alike.
    """
    if not alike(job) or not is_dataclass(args) or "n_layers" not in {f.name for f in fields(args)}:
        return 0
    number: int = getattr(args, "n_layers")  # noqa: B009
    sizes = [number] if plan is None else [len(layers_of(stage)) for stage in plan.stages]
    less = min(sizes) - KEPT
    return less if less >= _WORTH else 0


def without(args: Any, plan: PipelinePlan | None, less: int) -> tuple[Any, PipelinePlan | None]:
    """The model's arguments and plan with `less` layers fewer in each stage."""
    if not less:
        return args, plan
    if plan is None:
        return replace(args, n_layers=args.n_layers - less), None
    stages = []
    for stage in plan.stages:
        gone = set(layers_of(stage)[KEPT // 2 : KEPT // 2 + less])
        stages.append(tuple(name for name in stage if name not in gone))
    return args, replace(plan, stages=tuple(stages))


def layers_of(stage: Iterable[str]) -> list[str]:
    """The names in `stage` that are layers."""
    return [name for name in stage if name.startswith("layers.")]


def watch(modules: Sequence[nn.Module], tracker: MemoryTracker) -> None:
    """Tell `tracker` when the layers of `modules`, which are the stages or the model, begin their forward and
    end their backward.
    """
    for number, module in enumerate(modules):
        layers = list(getattr(module, "layers", nn.ModuleDict()).values())
        for index, layer in enumerate(layers):
            edge = index if index < KEPT // 2 else index - len(layers)

            def begins(_: nn.Module, inputs: Any, number: int = number, edge: int = edge) -> None:
                tracker.cut(("forward", number, edge))
                for value in inputs:
                    if isinstance(value, Tensor) and value.requires_grad:
                        value.register_hook(lambda _: tracker.cut(("backward", number, edge)))
                        return

            layer.register_forward_pre_hook(begins)


@dataclass(frozen=True)
class Grown:
    """The log of a process with `times` more layers than `short`'s; `long`'s has one more."""

    short: Log | Stretched
    long: Log | Stretched
    times: int

    def peaks(self, without: Iterable[str] = ()) -> list[tuple[str, dict[str, int]]]:
        """As `Log.peaks`, for the pieces that both have."""
        hidden = set(without)
        longer = dict(_pieces(self.long, hidden))
        found = []
        for piece, (name, held) in _pieces(self.short, hidden):
            more = longer[piece][1]
            found.append((name, {k: v + self.times * (more[k] - v) for k, v in held.items()}))
        return found


def _pieces(log: Log | Stretched, hidden: set[str]) -> Iterator[tuple[Any, tuple[str, dict[str, int]]]]:
    """Each piece of the step with what it is known by: its mark, its layer, and how often that was before."""
    seen: Counter[tuple[str, Place | None]] = Counter()
    for place, peak in zip(log.places, log.peaks(hidden), strict=True):
        key = peak[0], place
        seen[key] += 1
        yield (*key, seen[key]), peak


def grown(short: Counts, long: Counts, times: int) -> Counts:
    """Counts of a process with `times` more layers than `short`'s."""
    return short.plus(long.plus(short, -1), times)
