"""Extrapolates a model of many equal layers from two traces of models with few layers.

The time of a trace is proportional to the number of layers, and most layers are alike: one more layer adds
the same bytes at each moment of the step, the same products, and so on. So a stage of K layers is traced with
4 and with 5 layers, and the difference is added K - 4 times.

Memory grows by a different amount at each moment (parameters always, activations until their layer's
backward, gradients after it), and the peak of a short model may be at another moment than that of a long one.
So the step is cut at each layer's forward and backward, and each piece is extrapolated separately. The pieces
of the first two and last two layers exist in every model; two, because FSDP2 prefetches one layer. Memory
changes linearly over the layers between them, so it never exceeds both ends. Tests compare with traces of
whole models.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from octavo.commands.estimate.memory_tracker import LayerPass, Log, MemoryTracker
from octavo.commands.estimate.microbatch_extrapolation import ManyMicrobatchesLog
from octavo.commands.estimate.operations import Counts
from octavo.config import JobConfig
from octavo.preflight.pipeline_plan import PipelinePlan

KEPT_LAYERS = 4
"""Layers per stage in the shorter trace: the first two and the last two."""
_MIN_SKIPPED = 6
"""Number of skipped layers from which two short traces take less time than a whole one."""


def layers_are_alike(job: JobConfig) -> bool:
    """Whether no setting of `job` applies to some layers only."""
    ac, float8 = job.activation_checkpoint, job.float8
    if ac.mode == "selective" and ac.selective_ac_option != "op":
        return False
    if "float8" not in job.model.converters:
        return True
    named = any(part.startswith("layers") or part[:1].isdigit() for part in float8.filter_fqns)
    return not named and not float8.layer_recipes


def layers_to_skip(job: JobConfig, args: Any, plan: PipelinePlan | None) -> int:
    """Number of layers per stage that the shorter trace can skip; 0 if layers are not known to be alike."""
    if (
        not layers_are_alike(job)
        or not is_dataclass(args)
        or "n_layers" not in {f.name for f in fields(args)}
    ):
        return 0
    number: int = getattr(args, "n_layers")  # noqa: B009
    sizes = [number] if plan is None else [len(layers_of(stage)) for stage in plan.stages]
    skipped = min(sizes) - KEPT_LAYERS
    return skipped if skipped >= _MIN_SKIPPED else 0


def skip_layers(args: Any, plan: PipelinePlan | None, skipped: int) -> tuple[Any, PipelinePlan | None]:
    """Return the model's arguments and plan with `skipped` layers fewer in each stage."""
    if not skipped:
        return args, plan
    if plan is None:
        return replace(args, n_layers=args.n_layers - skipped), None
    stages = []
    for stage in plan.stages:
        removed = set(layers_of(stage)[KEPT_LAYERS // 2 : KEPT_LAYERS // 2 + skipped])
        stages.append(tuple(name for name in stage if name not in removed))
    return args, replace(plan, stages=tuple(stages))


def layers_of(stage: Iterable[str]) -> list[str]:
    return [name for name in stage if name.startswith("layers.")]


def mark_layers(modules: Sequence[nn.Module], tracker: MemoryTracker) -> None:
    """Mark the beginning of each layer's forward and the end of its backward in `tracker`.

    modules: the pipeline stages, or the model.
    """
    for number, module in enumerate(modules):
        layers = list(getattr(module, "layers", nn.ModuleDict()).values())
        for index, layer in enumerate(layers):
            edge = index if index < KEPT_LAYERS // 2 else index - len(layers)

            def on_forward(_: nn.Module, inputs: Any, number: int = number, edge: int = edge) -> None:
                tracker.mark_layer(("forward", number, edge))
                for value in inputs:
                    if isinstance(value, Tensor) and value.requires_grad:
                        value.register_hook(lambda _: tracker.mark_layer(("backward", number, edge)))
                        return

            layer.register_forward_pre_hook(on_forward)


@dataclass(frozen=True)
class ManyLayersLog:
    """The log of a rank with `times` more layers than in `short`; `long` has one more layer than `short`."""

    short: Log | ManyMicrobatchesLog
    long: Log | ManyMicrobatchesLog
    times: int

    def peaks(self, without: Iterable[str] = ()) -> list[tuple[str, dict[str, int]]]:
        """As `Log.peaks`, for the pieces of the short trace."""
        hidden = set(without)
        long_pieces = dict(_pieces(self.long, hidden))
        peaks = []
        for piece, (name, held) in _pieces(self.short, hidden):
            longer = long_pieces[piece][1]
            peaks.append((name, {k: v + self.times * (longer[k] - v) for k, v in held.items()}))
        return peaks


def _pieces(
    log: Log | ManyMicrobatchesLog, hidden: set[str]
) -> Iterator[tuple[Any, tuple[str, dict[str, int]]]]:
    """Yield each piece of the step: its key (mark, layer pass, occurrence of the two) and its peak."""
    occurrences: Counter[tuple[str, LayerPass | None]] = Counter()
    for layer_pass, peak in zip(log.layer_passes, log.peaks(hidden), strict=True):
        key = peak[0], layer_pass
        occurrences[key] += 1
        yield (*key, occurrences[key]), peak


def extrapolate_layers(short: Counts, long: Counts, times: int) -> Counts:
    """Return the counts of a rank with `times` more layers than in `short`; `long` has one more."""
    return short.plus(long.plus(short, -1), times)
