"""The sizes of the shipped models that limit parallelism, so that impossible degrees are reported before
torch is imported. They repeat the models' own arguments (`models/llama3/__init__.py`); a test holds the two
equal.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """layers: of the model. shared: the dimensions that tensor parallelism divides, by name. tied: the output
    projection is the embedding.
    """

    layers: int
    shared: Mapping[str, int]
    tied: bool = False


def _llama(layers: int, dim: int, heads: int, groups: int, hidden: int, *, tied: bool = False) -> Sizes:
    return Sizes(layers, shared_sizes(dim, heads, groups, hidden), tied)


def shared_sizes(dim: int, heads: int, groups: int, hidden: int) -> dict[str, int]:
    """The dimensions of a Llama that tensor parallelism divides, by name."""
    return {
        "heads": heads,
        "key/value heads": groups,
        "feed-forward features": hidden,
        "features": dim,
    }


def units(layers: int, *, tied: bool) -> list[tuple[str, ...]]:
    """The modules of a Llama that a pipeline keeps together. Raises `ConfigError` for tied weights."""
    if tied:
        raise ConfigError(
            "parallelism.pipeline_parallel_degree: this model's output projection is its embedding (tied), "
            "which would have to be in the first stage and in the last; set the degree to 1"
        )
    return [("tok_embeddings",), *((f"layers.{number}",) for number in range(layers)), ("norm", "output")]


_8B = _llama(32, 4096, 32, 8, 14336)
_70B = _llama(80, 8192, 64, 8, 28672)
_405B = _llama(126, 16384, 128, 8, 53248)

SIZES: Mapping[str, Mapping[str, Sizes]] = MappingProxyType(
    {
        "llama3": {
            "debugmodel": _llama(6, 256, 16, 16, 768),
            "1B": _llama(16, 2048, 32, 8, 8192, tied=True),
            "3B": _llama(28, 3072, 24, 8, 8192, tied=True),
            "8B": _8B,
            "70B": _70B,
            "405B": _405B,
            "8B-3.0": _8B,
            "70B-3.0": _70B,
            "405B-3.0": _405B,
        }
    }
)
"""Model name -> flavor -> its sizes."""


def sizes_of(job: JobConfig) -> Sizes | None:
    """The sizes of the job's model; None for a custom model, whose sizes are known only after its import."""
    return SIZES.get(job.model.name, {}).get(job.model.flavor)


def undivided(sizes: Mapping[str, int], ranks: int) -> Iterator[str]:
    """One message if tensor parallelism over `ranks` does not divide `sizes` evenly."""
    wrong = [f"{n} {name} ({n} / {ranks} = {n / ranks:.2f})" for name, n in sizes.items() if n % ranks]
    if wrong:
        common = math.gcd(*sizes.values())
        able = [str(n) for n in range(1, common + 1) if common % n == 0]
        yield (
            f"parallelism.tensor_parallel_degree = {ranks}: the model has {' and '.join(wrong)}, which do "
            f"not divide evenly; degrees that divide them: {', '.join(able)}"
        )
