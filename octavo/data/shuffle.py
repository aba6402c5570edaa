"""Shuffles samples by a permutation per epoch that is computed for one index at a time.

The permutation must stay the same on every machine and torch version, or a resumed run reads other text than
the run it continues; `torch.randperm` does not promise that between releases. So it is a Feistel network,
which turns any keyed hash into a bijection on [0, 4^k), with cycle walking, which repeats it until the result
is below n (fewer than four times on average). It needs no memory and no start-up time for billions of
samples, and position 10^9 costs as much as position 0. It shuffles well; it is not cryptographic.

`permute` is the definition; `permute_range` and `permute_many` compute many indices at once, 50 times as
fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MASK64 = (1 << 64) - 1
_ROUNDS = 6


def mix64(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): spreads every input bit over all 64 output bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def permute(index: int, size: int, *, seed: int, epoch: int) -> int:
    """The image of `index` under the permutation of range(size) for (seed, epoch).

    Args:
        index: position in the epoch, 0 <= index < size.
        size: number of samples in an epoch.
        seed, epoch: any integers; each pair is a different order.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside range({size})")
    half_bits = ((size - 1).bit_length() + 1) // 2  # 4**half_bits >= size
    half_mask = (1 << half_bits) - 1
    key = mix64(mix64(seed & _MASK64) ^ (epoch & _MASK64))
    while True:
        left, right = index >> half_bits, index & half_mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix64(key ^ mix64((number << 56) ^ right)) & half_mask)
        index = (left << half_bits) | right
        if index < size:
            return index


def permute_range(start: int, stop: int, size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """`permute` of each index in [start, stop), as int64 [stop - start]."""
    import numpy as np

    return permute_many(np.arange(start, stop, dtype=np.int64), size, seed=seed, epoch=epoch)


def permute_many(indices_N: NDArray[np.int64], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """`permute` of each of `indices_N`, all in range(size)."""
    import numpy as np

    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    key = np.uint64(mix64(mix64(seed & _MASK64) ^ (epoch & _MASK64)))
    values_N = indices_N.astype(np.uint64)
    outside = np.arange(len(values_N))
    while len(outside):
        left, right = values_N[outside] >> half_bits, values_N[outside] & half_mask
        for number in range(_ROUNDS):
            mixed = _mix64_many(np.uint64(number << 56) ^ right)
            left, right = right, left ^ (_mix64_many(key ^ mixed) & half_mask)
        values_N[outside] = (left << half_bits) | right
        outside = outside[values_N[outside] >= size]
    return values_N.astype(np.int64)


def _mix64_many(values_N: Any) -> Any:
    import numpy as np

    values_N = values_N + np.uint64(0x9E3779B97F4A7C15)  # unsigned arrays wrap around silently
    values_N = (values_N ^ (values_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values_N = (values_N ^ (values_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values_N ^ (values_N >> np.uint64(31))
