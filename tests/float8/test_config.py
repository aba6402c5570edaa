"""The options mean what torchao's mean."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from octavo import float8 as ours
from octavo.float8 import (
    RECIPES,
    Cast,
    CastConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Gemm,
    Recipe,
    ScalingType,
    convert_to_float8_training,
)
from octavo.float8.config import Float8LinearRecipeName, ScalingGranularity
from tests.float8.torchao_reference import RECIPES as SHARED
from tests.float8.torchao_reference import torchao

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("name", RECIPES)
def test_options_and_recipes_translate_both_ways(name: str) -> None:
    config = Float8LinearConfig.from_recipe_name(name)
    assert config.to_recipe() is RECIPES[name]
    assert Float8LinearConfig.from_recipe(RECIPES[name]) == config
    assert Float8LinearConfig.from_recipe_name(Float8LinearRecipeName(name)) == config


def test_every_name_of_torchaos_interface_is_here_or_left_out_on_purpose() -> None:
    # Documented in docs/float8.md: FP8Granularity belongs to torchao's inference.
    assert set(torchao.__all__) - set(ours.__all__) == {"FP8Granularity"}
    theirs = {f.name for f in fields(torchao.Float8LinearConfig)}
    assert theirs - {f.name for f in fields(Float8LinearConfig)} == {"force_recompute_fp8_weight_in_bwd"}


@pytest.mark.parametrize("name", SHARED)
def test_defaults_are_torchaos(name: str) -> None:
    mine, theirs = (c.from_recipe_name(name) for c in (Float8LinearConfig, torchao.Float8LinearConfig))
    for f in fields(Float8LinearConfig):
        if f.name == "recipe":  # ours alone
            continue
        a, b = getattr(mine, f.name), getattr(theirs, f.name)
        if f.name.startswith("cast_config"):
            assert a.scaling_type.value == b.scaling_type.value
            assert a.target_dtype == b.target_dtype
            assert a.scaling_granularity.value == b.scaling_granularity.value
        elif f.name.startswith("gemm_config"):
            assert a.use_fast_accum == b.use_fast_accum
        elif f.name != "emulate":  # ours chooses
            assert a == b, f.name


def test_the_default_is_tensorwise() -> None:
    assert Float8LinearConfig().to_recipe() is RECIPES["tensorwise"]
    assert Float8LinearConfig().emulate is None


def test_powers_of_two_are_an_option_of_any_recipe() -> None:
    config = replace(Float8LinearConfig(), round_scales_to_power_of_2=True)
    assert {c.scale.value for g in config.to_recipe().gemms.values() for c in (g.a, g.b)} == {"pow2"}
    mx = replace(Float8LinearConfig.from_recipe_name("mxfp8"), round_scales_to_power_of_2=True)
    assert mx.to_recipe() is RECIPES["mxfp8"]


def test_fast_accumulation_reaches_the_product() -> None:
    config = Float8LinearConfig(gemm_config_grad_weight=Float8GemmConfig(use_fast_accum=True))
    recipe = config.to_recipe()
    assert (recipe.output.fast_accum, recipe.grad_input.fast_accum, recipe.grad_weight.fast_accum) == (
        True,
        False,
        True,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cast_config_input": CastConfig(ScalingType.DISABLED)},
            "product for output.*cast both, or neither",
        ),
        ({"cast_config_input": CastConfig(target_dtype=E5M2)}, "product for grad_weight.*e5m2"),
        (
            {
                "cast_config_weight": CastConfig(target_dtype=E4M3),
                "cast_config_weight_for_grad_input": CastConfig(target_dtype=E5M2),
            },
            "cast_config_weight.*one dtype",
        ),
        (
            {
                "enable_fsdp_float8_all_gather": True,
                "cast_config_weight": CastConfig(scaling_granularity=ScalingGranularity.AXISWISE),
            },
            "enable_fsdp_float8_all_gather.*tensorwise or blockwise",
        ),
    ],
)
def test_invalid_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Float8LinearConfig(**options)


def test_cast_options_are_checked() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        CastConfig(target_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="DISABLED"):
        CastConfig(ScalingType.DISABLED, ScalingGranularity.AXISWISE)
    with pytest.raises(ValueError, match="rowise"):
        Float8LinearConfig.from_recipe_name("rowise")


def test_a_recipe_of_ones_own_takes_the_other_options() -> None:
    tile = Cast(torch.float8_e4m3fn, (64, 64))
    mine = Recipe("mine", *[Gemm(tile, tile)] * 3)
    config = Float8LinearConfig.from_recipe(mine, emulate=True, enable_fsdp_float8_all_gather=True)
    assert config.recipe is mine
    assert config.to_recipe() is mine
    model = convert_to_float8_training(nn.Linear(128, 64), config=config)
    assert model.emulate is True
    assert model.gathers_float8
    assert model.recipe is mine


def test_a_recipe_together_with_cast_options_is_an_error() -> None:
    with pytest.raises(ValueError, match="round_scales_to_power_of_2 was given as well"):
        Float8LinearConfig(recipe=RECIPES["mxfp8"], round_scales_to_power_of_2=True)
    with pytest.raises(ValueError, match="needs one float8 weight"):
        Float8LinearConfig(recipe=RECIPES["mxfp8"], enable_fsdp_float8_all_gather=True)
