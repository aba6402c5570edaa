"""How the processes of a job are laid out: one degree an axis, whose product is their number.

    pipeline    processes that each hold some of the layers, and hand activations on
    replicate   groups that each hold a whole copy of the model
    shard       processes that one copy is sharded over (FSDP2)
    context     processes that share a sequence, each with a part of its positions
    tensor      processes that share every matrix product

Processes that differ in `replicate` or `shard` read different data. The last axis is the innermost: its
processes are neighbours, since they talk most.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from octavo.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from octavo.config.schema import Parallelism


@dataclass(frozen=True)
class Axis:
    """One axis: its name, its key in [parallelism], and its dimension of the device mesh."""

    name: str
    key: str
    mesh: str


AXES = (
    Axis("pipeline", "pipeline_parallel_degree", "pp"),
    Axis("replicate", "data_parallel_replicate_degree", "dp_replicate"),
    Axis("shard", "data_parallel_shard_degree", "dp_shard"),
    Axis("context", "context_parallel_degree", "cp"),
    Axis("tensor", "tensor_parallel_degree", "tp"),
)
"""Outermost first."""

KEYS: Mapping[str, str] = MappingProxyType({axis.name: axis.key for axis in AXES})
"""Name of an axis -> its key in [parallelism]."""


@dataclass(frozen=True)
class ParallelDims:
    """The number of processes along each axis."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def degrees(self) -> dict[str, int]:
        """Axis -> degree, outermost first."""
        return asdict(self)

    @property
    def data(self) -> int:
        """The number of process groups that read different data."""
        return self.replicate * self.shard

    @property
    def sharded(self) -> int:
        """The number of processes that FSDP2 shards a parameter over; those that share a sequence count."""
        return self.shard * self.context

    @property
    def sequence_multiple(self) -> int:
        """`training.seq_len` must be a multiple of this, so that processes get equal parts of a sequence.

        Under context parallelism each process has two parts, one from the front and one from the back,
        because late positions cost more attention.
        """
        return self.tensor * (2 * self.context if self.context > 1 else 1)


def parallel_dims_of(parallelism: "Parallelism", processes: int) -> ParallelDims:
    """The degrees that `parallelism` asks for on `processes` processes.

    Raises:
        ConfigError: they do not multiply to the number of processes; the message shows the arithmetic.
    """
    degrees = {axis: getattr(parallelism, key) for axis, key in KEYS.items()}
    there = f"{processes} process{'es' if processes > 1 else ''}"
    left = degrees["shard"] == -1
    # Degrees of 1 are left out of the message, except an explicit shard degree.
    asked = {KEYS[axis]: n for axis, n in degrees.items() if n not in (1, -1) or (axis, n) == ("shard", 1)}
    product = math.prod(asked.values())
    terms = f"parallelism.{' x '.join(asked)} = {' x '.join(map(str, asked.values()))}"
    if len(asked) > 1:
        terms += f" = {product}"
    if left and processes % product:
        remedy = "change a degree, or the number of processes (NGPU)"
        raise ConfigError([Problem(f"{terms} does not divide {there}", remedy)])
    if not left and product != processes:
        what = f"{terms if asked else 'all of parallelism are 1'}, but the job has {there}"
        raise ConfigError([Problem(what, "data_parallel_shard_degree = -1 takes what is left")])
    return ParallelDims(**degrees | {"shard": processes // product if left else degrees["shard"]})
