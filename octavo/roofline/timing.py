"""Benchmarks alternatives against each other, interleaved in one process.

A GPU's clock follows its temperature and power, and a shared CPU follows its other users, so two times taken
minutes apart cannot show which of two functions is faster. So every round runs all sides of a comparison,
starting with a different one each time, and times are compared within a round.

On a GPU each call is timed by two events. Before the first, the cache is emptied by writing more bytes than
it holds, because in training the operands of a GEMM are not in the cache either. The writes are repeated
until they keep the GPU busy while Python queues the call, so the kernels are measured without their launches.
Where launches are part of the work, as in a whole model, `empty_cache=False` measures wall-clock time
instead.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

CACHE_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU (50 MB on an H100, 126 MB on a B200)."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A set of measurements and their order statistics."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third; of one number, that number."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def most(self) -> float:
        return max(self.values)


def paired(over: Sequence[float], under: Sequence[float]) -> Spread:
    """`over / under`, round by round: how many times faster `under` is, where both are times."""
    return Spread(tuple(a / b for a, b in zip(over, under, strict=True)))


def time_in_turn(
    sides: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 3,
    empty_cache: bool = True,
    until: float | None = None,
) -> dict[str, Spread]:
    """Seconds of each side, one value per round; every side runs once per round.

    Each round starts with a different side and shuffles the others, so that no side always follows the same
    one. `until`, on the clock of `time.perf_counter`,
    is the time after which no round starts; the first always runs. Raises ValueError without sides or rounds.
    """
    if not sides or rounds < 1:
        raise ValueError(f"{len(sides)} sides in {rounds} rounds: there must be at least one of each")
    time_one = _stopwatch(device, empty_cache)
    for call in sides.values():
        for _ in range(warmup):
            call()
    names = list(sides)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn and until is not None and time.perf_counter() > until:
            break
        for name in _order(names, turn):
            taken[name].append(time_one(sides[name]))
    return {name: Spread(tuple(seconds)) for name, seconds in taken.items()}


def _order(names: Sequence[str], turn: int) -> list[str]:
    first = turn % len(names)
    rest = [name for i, name in enumerate(names) if i != first]
    random.Random(turn).shuffle(rest)
    return [names[first], *rest]


def _stopwatch(device: torch.device, empty_cache: bool) -> Callable[[Call], float]:
    if device.type != "cuda":
        return _by_the_wall
    if not empty_cache:
        return _by_the_wall_on_gpu
    return _Events(device)


class _Events:
    """Times calls on a GPU between two events, behind as many writes as it takes Python to queue the call."""

    def __init__(self, device: torch.device):
        self._ballast = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
        self._writes: dict[int, int] = {}
        self._ballast.zero_()
        self._seconds_of_a_write = self._between_events(self._ballast.zero_)

    def __call__(self, call: Call) -> float:
        if id(call) not in self._writes:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            queueing = time.perf_counter() - start
            torch.cuda.synchronize()
            self._writes[id(call)] = min(max(1, math.ceil(1.5 * queueing / self._seconds_of_a_write)), 50)
        for _ in range(self._writes[id(call)]):
            self._ballast.zero_()
        return self._between_events(call)

    @staticmethod
    def _between_events(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _by_the_wall(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_the_wall_on_gpu(call: Call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start
