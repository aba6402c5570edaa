"""Every layout, in every precision, eager and compiled: what `test_layouts.py` and `layout_table.py` run.

A case trains the debug model for five steps on gloo, and is compared with one process that trains in the same
precision at the same global batch, both eager or both compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from octavo.config.parallel_dims import KEYS, ParallelDims, parallel_dims_of
from octavo.config.schema import Parallelism
from tests.helpers import launching

BASE = {
    "training.global_batch_size": 8,
    "training.local_batch_size": 2,
    "training.steps": 5,
    "metrics.log_grad_norm": True,
    "validation.enable": True,
    "validation.fraction": 0.05,
    "validation.freq": 5,
    "validation.steps": -1,
}
DEGREES = {axis: f"parallelism.{key}" for axis, key in KEYS.items()}
SCHEDULE = "parallelism.pipeline_parallel_schedule"


@dataclass(frozen=True)
class Precision:
    """flags: of both sides. sharded: of a layout that has parameters sharded, in addition. limit: the most
    that losses and gradient norms may differ by, relatively.
    """

    name: str
    flags: dict[str, Any]
    limit: float
    sharded: dict[str, Any] = field(default_factory=dict)


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32", {}, 1e-4),
        Precision("bfloat16", {"training.mixed_precision_param": "bfloat16"}, 1e-2),
        Precision(
            "tensorwise",
            launching.recipe("tensorwise"),
            1e-2,
            {
                "float8.enable_fsdp_float8_all_gather": True,
                "float8.precompute_float8_dynamic_scale_for_fsdp": True,
            },
        ),
        Precision("rowwise", launching.recipe("rowwise"), 1e-2),
    )
}


@dataclass(frozen=True)
class Case:
    """`world` processes with `degrees` and `flags`, in `precision`, against one process."""

    layout: str
    world: int
    degrees: dict[str, int]
    precision: Precision = PRECISIONS["float32"]
    compiled: bool = False
    flags: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.layout}, {self.precision.name}{', compiled' if self.compiled else ''}"

    @cached_property
    def place(self) -> ParallelDims:
        degrees = {KEYS[axis]: degree for axis, degree in self.degrees.items()}
        return parallel_dims_of(Parallelism(**degrees), self.world)

    @property
    def alone(self) -> dict[str, Any]:
        """The flags of the one process."""
        compiled = {"training.compile": True} if self.compiled else {}
        return {**BASE, **self.both, **self.precision.flags, **compiled}

    @property
    def here(self) -> dict[str, Any]:
        """The flags of each of the many."""
        # As many sequences at once as let a pipeline fill, and leave two passes to accumulate if they can.
        local = max(8 // self.place.data // 2, 2) if self.place.pipeline > 1 else 2
        sharded = self.precision.sharded if self.place.sharded > 1 else {}
        degrees = {DEGREES[axis]: degree for axis, degree in self.degrees.items()}
        return {**self.alone, "training.local_batch_size": local, **sharded, **degrees, **self.flags}


@dataclass(frozen=True)
class Difference:
    """The largest relative differences over all steps; and of the validation after them."""

    loss: float
    grad_norm: float
    validation: float


def _largest(got: list[float], want: list[float]) -> float:
    assert len(got) == len(want) > 0
    return max(abs(g - w) / abs(w) for g, w in zip(got, want, strict=True))


def measure(case: Case, alone: Callable[[Case], launching.Run], folder: Path) -> Difference:
    """Train, and compare. `alone` gives the run of one process."""
    want = alone(case)
    got = launching.train(folder, case.here, world=case.world)
    assert got.exit_codes == [0] * case.world, got.log
    assert len(got.losses) == case.here["training.steps"]
    return Difference(
        _largest(got.losses, want.losses),
        _largest([line["grad_norm"] for line in got.metrics], [line["grad_norm"] for line in want.metrics]),
        _largest(got.validation_losses, want.validation_losses),
    )


def _case(layout: str, world: int, flags: dict[str, Any] | None = None, **degrees: int) -> Case:
    return Case(layout, world, degrees, flags=flags or {})


TRAVEL = {"parallelism.context_parallel_rotate_method": "alltoall"}
LAYOUTS = [
    _case("DDP 2", 2, replicate=2),
    _case("FSDP 2", 2),
    _case("HSDP 2 x 2", 4, replicate=2),
    _case("TP 2", 2, tensor=2),
    _case("CP 2", 2, context=2),
    _case("CP 2, ring", 2, TRAVEL, context=2),
    _case("CP 4, ring", 4, TRAVEL, context=4),
    _case("PP 2", 2, pipeline=2),
    _case("FSDP 2, TP 2", 4, tensor=2),
    _case("FSDP 2, PP 2", 4, pipeline=2),
    _case("FSDP 2, CP 2", 4, context=2),
    _case("HSDP 2 x 1, TP 2", 4, replicate=2, tensor=2),
    _case("TP 2, CP 2", 4, tensor=2, context=2),
    _case("TP 2, PP 2", 4, tensor=2, pipeline=2),
    _case("CP 2, PP 2", 4, context=2, pipeline=2),
    _case("HSDP 2 x 2, TP 2", 8, replicate=2, tensor=2),
    _case("FSDP 2, TP 2, PP 2", 8, tensor=2, pipeline=2),
    _case("FSDP 2, TP 2, CP 2", 8, tensor=2, context=2),
]
SCHEDULES = [
    _case(f"FSDP 2, PP 2, {schedule}", 4, {SCHEDULE: schedule}, pipeline=2)
    for schedule in ("GPipe", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
]
_SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble")  # not to be compiled


def in_every_way(case: Case) -> list[Case]:
    """`case` in each precision, eager and compiled, as far as there is such a thing."""
    modes = (False,) if case.layout.endswith(_SPLIT_BACKWARD) else (False, True)
    return [
        Case(case.layout, case.world, case.degrees, precision, compiled, case.flags)
        for compiled in modes
        for precision in PRECISIONS.values()
    ]


ALL = [case for layout in [*LAYOUTS, *SCHEDULES] for case in in_every_way(layout)]
