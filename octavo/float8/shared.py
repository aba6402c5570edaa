"""Linears that read the same input share its float8 casts.

wq, wk and wv read one tensor, and so do w1 and w3. Each would cast it again and keep its own float8 copy for
backward: three casts and three bytes an element where one of each will do. So a cast is remembered for as
long as its input lives, keyed on the tensor's identity and version; an in-place edit gives a new version, and
with it new casts.

This serves eager mode. A compiled graph shares equal casts by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from octavo.float8.quantize import Quantized

Casts = tuple[Quantized | None, Quantized | None]
_remembered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def shared_casts(x: Tensor, how: Hashable, make: Callable[[], Casts]) -> Casts:
    """`make()`, or what it gave for the same tensor, unchanged since, and the same `how`.

    What `make` returns must not refer to `x`, which would never be freed.
    """
    if torch.compiler.is_compiling() or x.is_inference():
        return make()
    casts = _remembered.setdefault(x, {})
    key = (x._version, how)
    if key not in casts:
        if any(version != x._version for version, _ in casts):
            casts.clear()
        casts[key] = make()
    return casts[key]
