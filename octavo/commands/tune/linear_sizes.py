"""The linear layers of a job's model, and the sizes of their matrix products on one device.

M tokens of a microbatch on one device, K input features, N output features. Tensor parallelism splits N (or K
in row-wise layers) but not M, because tokens are gathered before a product; context parallelism splits M.
Layers that read the same tensor form a group: those with the same recipe share its cast.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from octavo import models
from octavo.config import ConfigError, JobConfig
from octavo.config.parallel_dims import ParallelDims
from octavo.tokenizer import build_tokenizer


class Size(NamedTuple):
    """The size of `x[M, K] @ w[N, K]^T`."""

    M: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"M={self.M} K={self.K} N={self.N}"


@dataclass(frozen=True)
class Layer:
    """`count` layers of one `size` that differ only in their number, which is * in `pattern`."""

    pattern: str
    size: Size
    count: int


Group = tuple[Layer, ...]
"""Layers that read the same tensor."""


def groups_of(job: JobConfig, layout: ParallelDims) -> tuple[list[Group], list[str]]:
    """Return the layers that can be in float8, in groups, and the names of those that `filter_fqns` excludes.

    Raises:
        ConfigError: the model cannot be built, or has no such layer.
    """
    models.import_custom(job.experimental.custom_import, job.model.name)
    spec = models.get(job.model.name)
    vocabulary = _vocabulary(job)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes of zero, which are refused below with a reason
        args = spec.args(job.model.flavor, job.model.args)
        model = spec.build(spec.configure(args, vocabulary, job.training.seq_len))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept = [name for name in linears if any(part in name for part in job.float8.filter_fqns)]
    if len(kept) == len(linears):
        raise ConfigError("float8.filter_fqns leaves no linear layer of this model to choose a recipe for")
    sequences = job.training.local_batch_size
    if layout.pipeline > 1:
        sequences = job.parallelism.pipeline_parallel_microbatch_size
    M = sequences * job.training.seq_len // layout.context
    found: dict[tuple[str, Size], int] = {}
    for name, linear in linears.items():
        if name in kept:
            continue
        K, N = linear.in_features, linear.out_features
        if 0 in (K, N):
            raise ConfigError(
                f"{name} has {K} to {N} features: the size of this model follows its tokenizer, and "
                f"model.hf_assets_path = {job.model.hf_assets_path} cannot be read"
            )
        if name.rpartition(".")[2] in spec.linears.rows:
            K //= layout.tensor
        else:
            N //= layout.tensor
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), Size(M, K, N))
        found[key] = found.get(key, 0) + 1
    layers = [Layer(pattern, size, count) for (pattern, size), count in found.items()]
    patterns = [layer.pattern for layer in layers]
    twice = {pattern for pattern in patterns if patterns.count(pattern) > 1}
    if twice:
        raise ConfigError(
            f"layers called {', '.join(sorted(twice))} differ in size, so one pattern can't name them"
        )
    return _grouped(layers, spec.linears.same_input), kept


def _vocabulary(job: JobConfig) -> int:
    """The tokenizer's vocabulary size; 0 if it cannot be read, for models with a size of their own."""
    try:
        return build_tokenizer(job.model.hf_assets_path).vocab_size
    except ConfigError:
        return 0


def _grouped(layers: Sequence[Layer], same_input: Sequence[tuple[str, ...]]) -> list[Group]:
    groups: dict[tuple[str, object], list[Layer]] = {}
    for layer in layers:
        parent, _, leaf = layer.pattern.rpartition(".")
        which = next((names for names in same_input if leaf in names), leaf)
        groups.setdefault((parent, which), []).append(layer)
    return [tuple(group) for group in groups.values()]
