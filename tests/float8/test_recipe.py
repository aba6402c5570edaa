"""Recipes are data, and invalid ones are errors."""

from __future__ import annotations

import pytest
import torch

from octavo.float8 import FULL, RECIPES, Cast, Gemm, Recipe, ScaleFormat
from octavo.float8.recipe import find_recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def test_the_recipes() -> None:
    just_in_time = ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise", "mxfp8"]
    assert list(RECIPES) == [*just_in_time, "tensorwise_previous_step"]
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    assert [name for name, recipe in RECIPES.items() if recipe.gatherable] == [
        "tensorwise",
        "blockwise",
        "tensorwise_previous_step",
    ]
    assert not RECIPES["rowwise_with_gw_hp"].grad_weight.float8
    assert {c.scale for g in RECIPES["mxfp8"].gemms.values() for c in (g.a, g.b)} == {ScaleFormat.E8M0}


def test_a_square_block_is_not_gatherable_if_the_uses_differ() -> None:
    square, other = Cast(E4M3, (FULL, FULL)), Cast(E4M3, (128, 128))
    recipe = Recipe("two squares", Gemm(square, square), Gemm(square, other), Gemm(None, None))
    assert square.square
    assert not recipe.gatherable


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cast(torch.bfloat16, (1, FULL)), "bfloat16"),
        (lambda: Cast(torch.float8_e4m3fnuz, (1, FULL)), "e4m3fnuz"),
        (lambda: Cast(E4M3, (0, 128)), r"\(0, 128\)"),
        *(
            (lambda block=block: Cast(E4M3, block), "must be a tuple")
            for block in ([1, -1], 128, (1,), (1, 2.0))
        ),
        (lambda: Gemm(Cast(E5M2, (1, FULL)), Cast(E5M2, (1, FULL))), "e5m2 by float8_e5m2.*e4m3fn"),
        (lambda: Gemm(Cast(E5M2, (1, FULL)), None), "cast both, or neither"),
        (lambda: find_recipe("rowise"), "rowise.*rowwise_with_gw_hp"),
    ],
)
def test_invalid_recipes_are_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scales_of_a_whole_recipe_can_be_changed() -> None:
    floor = RECIPES["mxfp8"].with_scales(ScaleFormat.E8M0_FLOOR)
    assert floor.output.a == Cast(E4M3, (1, 32), ScaleFormat.E8M0_FLOOR)
    assert RECIPES["rowwise_with_gw_hp"].with_scales(ScaleFormat.FP32).grad_weight == Gemm(None, None)
    assert hash(floor) != hash(RECIPES["mxfp8"])
