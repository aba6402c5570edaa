"""Linears that read the same input share its float8 casts, and what was measured of it.

wq, wk and wv read one tensor, and so do w1 and w3. Each would cast it again and keep its own float8 copy for
backward: three casts and three bytes an element where one of each will do. Linears with one input are called
one after the other, so the casts of the last input are remembered, and of no other: what is remembered never
costs more than one layer's input, and ends with it.

Only the result of an operation is remembered, never a tensor from outside: a pipeline's receive buffer, or
memory shared with numpy, gets new values without a new version. An in-place edit of a result does make a new
version, and with it new casts; an edit through `.data` does not.

This serves eager mode. A compiled graph shares equal casts by itself.
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
    """What was made of one tensor, by key it was made. `tensor` is dead once the tensor is."""

    tensor: weakref.ref[Tensor]
    version: int
    results: dict[Hashable, Any] = field(default_factory=dict)


_last: _LastInput | None = None


def _forget(tensor: weakref.ref[Tensor]) -> None:
    global _last
    if _last is not None and _last.tensor is tensor:
        _last = None


def compute_once(x: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """`compute()`, or what it gave for the same tensor, unchanged since, and the same `key`."""
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
