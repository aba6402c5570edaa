"""The sizes of a model that limit parallelism, so that impossible degrees are reported before torch is
imported.
"""

import math
from collections.abc import Iterator, Mapping

from octavo.config.schema import JobConfig
from octavo.core.errors import ConfigError
from octavo.families import FAMILIES, ModelArgs
from octavo.preflight import model_settings


def args_of(job: JobConfig) -> ModelArgs | None:
    """The arguments of the job's model. None for a custom model, which is known only after its import, and
    for arguments that are reported as wrong.
    """
    family = FAMILIES.get(job.model.name)
    args = family.flavors.get(job.model.flavor) if family else None
    try:
        return args and model_settings.apply(args, job.model.args)
    except ConfigError:
        return None


def shared_sizes(args: ModelArgs) -> dict[str, int]:
    """The dimensions that tensor parallelism divides, by name."""
    sizes = {"heads": args.n_heads, "key/value heads": args.n_kv_heads}
    moe = args.moe
    if moe is None or moe.first_dense:
        sizes["feed-forward features"] = args.hidden_dim
    if moe is not None:
        sizes["features of an expert"] = moe.hidden_dim
        if moe.n_shared:
            sizes["features of the shared expert"] = moe.shared_dim
    return {**sizes, "features": args.dim}


def unsplit(args: ModelArgs, *, tensor: int, context: int) -> Iterator[str]:
    """One message if a model with latent attention is to be split in a way that it cannot be yet."""
    if args.latent is not None and (tensor > 1 or context > 1):
        axis, degree = ("tensor", tensor) if tensor > 1 else ("context", context)
        yield (
            f"parallelism.{axis}_parallel_degree = {degree}: latent attention is not split yet; set it "
            "to 1, and shard by data_parallel_shard_degree and pipeline_parallel_degree"
        )


def units(args: ModelArgs) -> list[tuple[str, ...]]:
    """The modules that a pipeline keeps together. Raises `ConfigError` for tied weights."""
    if args.tie_embeddings:
        raise ConfigError(
            "parallelism.pipeline_parallel_degree: this model's output projection is its embedding (tied), "
            "which would have to be in the first stage and in the last; set the degree to 1"
        )
    layers = ((f"layers.{number}",) for number in range(args.n_layers))
    return [("tok_embeddings",), *layers, ("norm", "output")]


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
