"""The maximum of magnitudes over ranks, for scales that span a tensor which ranks share.

Not every backend's floating-point maximum keeps a NaN. The bits of non-negative float32 numbers, read as
integers, have the same order as the numbers, and NaN lies above infinity; so the maximum is taken over the
bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def all_reduce_amax(amax: Tensor, groups: Iterable[str]) -> Tensor:
    """Element-wise maximum of the magnitudes `amax` over each process group named in `groups`, in float32.

    A collective call. NaN wins.
    """
    bits = amax.float().contiguous().view(torch.int32) & 0x7FFFFFFF  # without the sign, which a NaN may have
    for group in groups:
        bits = torch.ops._c10d_functional.all_reduce(bits, "max", group)
        bits = torch.ops._c10d_functional.wait_tensor(bits)
    return bits.view(torch.float32)
