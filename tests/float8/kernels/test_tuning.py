"""How often kernels are timed: once for sizes that are near each other, and no configuration twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.float8.kernels import needs

pytestmark = [needs.triton, needs.compiler]


def tunings(operator: str, M: int, K: int, *options: Any) -> list[tuple[tuple[Any, ...], int]]:
    """Key and number of configurations of each kernel that `operator` launches for `x[M, K]`."""
    from octavo.float8.kernels.kernel_launch import handed_to, tuning_of
    from octavo.float8.kernels.ops import LAUNCHERS

    found: list[tuple[tuple[Any, ...], int]] = []
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    with handed_to(lambda *launch: found.append(tuning_of(*launch))):
        LAUNCHERS[operator](x, *options, torch.float8_e4m3fn, "pow2", True, True)
    return found


def test_tokens_up_to_the_next_power_of_two_are_one_size() -> None:
    keys = {M: [key for key, _ in tunings("cast_by_rows", M, 4096)] for M in (8000, 8192, 8200)}

    assert keys[8000] == keys[8192] != keys[8200]
    assert len(keys[8000]) == 2
    assert tunings("cast_by_rows", 8192, 4096) != tunings("cast_by_rows", 8192, 2048)


def test_what_was_chosen_is_found_for_a_near_size() -> None:
    from octavo.float8.kernels.cast_tiles import _cast_tiles

    cache = _cast_tiles.cache
    cache[8192, 96, "test"] = "chosen"

    assert cache[8000, 96, "test"] == "chosen"
    assert (8200, 96, "test") not in cache
    assert (8000, 97, "test") not in cache


@pytest.mark.parametrize(
    ("operator", "K", "options", "counts"),
    [
        ("cast_by_rows", 4096, (), [4, 4]),
        ("cast_by_rows", 16384, (), [2, 4]),  # every tile is one row, with 8 or 16 warps
        ("cast_by_lines", 4096, (128,), [4]),
        ("cast_by_lines", 4096, (32,), [3]),  # 64 rows at a time are 32, one group
    ],
)
def test_configurations_that_amount_to_one_are_timed_once(
    operator: str, K: int, options: tuple[int, ...], counts: list[int]
) -> None:
    assert [count for _, count in tunings(operator, 8192, K, *options)] == counts
