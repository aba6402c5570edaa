"""Launching kernels: configurations, autotuning, the constants of a cast, and output tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from octavo.float8.kernels.numerics import INTERPRETING, ONE_BYTE

Config = dict[str, Any]
"""A kernel's tile sizes, and `num_warps` and `num_stages`."""

Destination = tuple[Tensor, Tensor]
"""`data` and `scale` that a caller allocated for a kernel to write, e.g. slices of larger tensors."""

MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
SCALE_FORMATS = {"fp32": 0, "pow2": 1, "e8m0": 2, "e8m0_floor": 3}
"""Any float32; a float32 power of two; one-byte powers of two, rounded up; the same, rounded down."""


class _BySize(dict[tuple[Any, ...], Any]):
    """Chosen configurations by key. The first entry of a key, a number of rows or elements, counts as the
    next power of two, so that a batch of another length rarely times a kernel again.
    """

    @staticmethod
    def near(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return triton.next_power_of_2(key[0]), *key[1:]

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self.near(key))

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return super().__getitem__(self.near(key))

    def __setitem__(self, key: tuple[Any, ...], config: Any) -> None:
        super().__setitem__(self.near(key), config)


def rows_at_a_time(config: Config, given: Config) -> int:
    """Rows of BLOCK_K that a kernel holds which works through STRIP rows in tiles of TILE elements."""
    return min(max(config["TILE"] // given["BLOCK_K"], 1), given["STRIP"])


def tuned(
    configs: tuple[Config, ...],
    key: list[str],
    updates: tuple[str, ...] = (),
    alike: Callable[[Config, Config], Any] | None = None,
) -> Any:
    """Decorates a kernel that chooses among `configs` by timing them, once for each value of `key`.

    `updates` names the pointers that the kernel both reads and writes; timing it restores what they point to.
    `alike`: the tile that a configuration amounts to, given the kernel's arguments; of several with one tile
    and as many warps, one is timed.
    The first configuration is the default, which the interpreter uses. `kernel.fn` is the plain kernel.
    """
    if INTERPRETING:
        return lambda kernel: Untuned(kernel, configs[0])
    triton_configs = [
        triton.Config(
            {name: value for name, value in config.items() if not name.startswith("num_")},
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        for config in configs
    ]

    def distinct(found: list[Any], sizes: Config, **constants: Any) -> list[Any]:
        given = {**sizes, **constants}
        first: dict[Any, Any] = {}
        for config in found:
            tile = tuple(config.kwargs.items()) if alike is None else alike(config.kwargs, given)
            first.setdefault((tile, config.num_warps, config.num_stages), config)
        return list(first.values())

    def tune(kernel: Any) -> Any:
        tuner = triton.autotune(
            configs=triton_configs,
            key=key,
            restore_value=list(updates) or None,
            prune_configs_by={"early_config_prune": distinct},
        )(kernel)
        tuner.cache = _BySize(tuner.cache)
        return tuner

    return tune


def tuning_of(kernel: Any, args: Any, kwargs: Config) -> tuple[tuple[Any, ...], int]:
    """The key under which a tuned `kernel` is timed for these arguments, and the configurations it tries."""
    kernel.nargs = dict(zip(kernel.arg_names, args, strict=False))
    given = {**kernel.nargs, **kwargs}
    dtypes = [str(value.dtype) for value in given.values() if isinstance(value, Tensor)]
    return _BySize.near((*(given[name] for name in kernel.keys), *dtypes)), len(kernel.prune_configs(kwargs))


class Untuned:
    """A kernel with one configuration, launched like an autotuned one. `fn` is the plain kernel."""

    def __init__(self, kernel: Any, config: Config) -> None:
        self.fn, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.fn[grid](*args, **kwargs, **self.config)


@contextmanager
def handed_to(launch: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Scope in which tuned kernels are handed to `launch(kernel, args, kwargs)` instead of launched."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch(kernel, args, kwargs)

    with patch.object(triton.runtime.Autotuner, "run", run):
        yield


def cast_constants(dtype: torch.dtype, scales: str) -> dict[str, int]:
    """The kernel constants for the float8 `dtype` and the scale format `scales`."""
    return {"MANTISSA": MANTISSA_BITS[dtype], "SCALES": SCALE_FORMATS[scales]}


def block_grid(M: int, K: int) -> Callable[[Config], tuple[int, int]]:
    """The grid that covers `[M, K]` in the tuned tiles of BLOCK_M x BLOCK_K."""
    return lambda meta: (triton.cdiv(M, meta["BLOCK_M"]), triton.cdiv(K, meta["BLOCK_K"]))


def empty_codes(x: Tensor, rows: bool = True, columns: bool = True) -> tuple[Tensor, Tensor]:
    """Uninitialized uint8 `data[M, K]` and `data_t[K, M]` for `x[M, K]`; `[0, 0]` if not wanted."""
    M, K = x.shape
    data = x.new_empty((M, K) if rows else (0, 0), dtype=torch.uint8)
    return data, x.new_empty((K, M) if columns else (0, 0), dtype=torch.uint8)


def empty_scale(x: Tensor, shape: tuple[int, ...], scales: str) -> Tensor:
    """Uninitialized scales: float32, or uint8 for one-byte formats."""
    one_byte = SCALE_FORMATS[scales] >= ONE_BYTE.value
    return x.new_empty(shape, dtype=torch.uint8 if one_byte else torch.float32)
