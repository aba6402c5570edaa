"""Linears that read the same input share its float8 casts, and its health measurements.

wq, wk and wv read one tensor, and so do w1 and w3. Each would cast it again and save its own float8 copy for
backward: three casts and three bytes per element instead of one. Linears with one input are called one after
the other, so only the casts of the last input are cached. The cache never costs more than one layer's input,
and is freed with it.

Only results of operations are cached, never a tensor from outside, whose values can change without a new
version (a pipeline's receive buffer, memory shared with numpy). An in-place edit of a result advances its
version and so invalidates the cache; an edit through `.data` does not.

This is for eager mode. The compiler merges equal operators of a graph by itself: those of a cast in plain
PyTorch, and the calls of a kernel (`kernels/ops.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class _LastInput:
    """Results computed from one tensor, by key. `tensor` is a weak reference."""

    tensor: weakref.ref[Tensor]
    version: int
    results: dict[Hashable, Any] = field(default_factory=dict)


_last: _LastInput | None = None


def _forget(tensor: weakref.ref[Tensor]) -> None:
    global _last
    if _last is not None and _last.tensor is tensor:
        _last = None


def compute_once(x: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """`compute()`, or its cached result for the same unmodified tensor `x` and the same `key`."""
    global _last
    if torch.compiler.is_compiling() or x.grad_fn is None or x.is_inference():
        return compute()
    last = _last
    if last is None or last.tensor() is not x or last.version != x._version:
        last = _last = _LastInput(weakref.ref(x, _forget), x._version)
    if key not in last.results:
        last.results[key] = compute()
    result: T = last.results[key]
    return result
