"""The public names of octavo.float8."""

from octavo.float8.casts.casting_adamw import Float8AdamW
from octavo.float8.casts.delayed_scaling import DelayedScaling
from octavo.float8.casts.weights_once import cast_weights_once
from octavo.float8.config import (
    CastConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
)
from octavo.float8.convert import (
    auto_filter_for_recipe,
    convert_from_float8_training,
    convert_to_float8_training,
)
from octavo.float8.convert import auto_filter_for_recipe as _auto_filter_for_recipe
from octavo.float8.distributed.fsdp_gather import precompute_float8_dynamic_scale_for_fsdp
from octavo.float8.distributed.parallel_styles import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from octavo.float8.grouped import Float8GroupedMM
from octavo.float8.linear import Float8Linear
from octavo.float8.matmul import EmulationWarning, describe_backend
from octavo.float8.matmul import describe_backend as describe_path
from octavo.float8.recipe import FULL, RECIPES, Cast, Gemm, Recipe, ScaleFormat, When

__all__ = [
    "FULL",
    "RECIPES",
    "Cast",
    "CastConfig",
    "DelayedScaling",
    "EmulationWarning",
    "Float8AdamW",
    "Float8ColwiseParallel",
    "Float8GemmConfig",
    "Float8GroupedMM",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Float8RowwiseParallel",
    "Gemm",
    "PrepareFloat8ModuleInput",
    "Recipe",
    "ScaleFormat",
    "ScalingGranularity",
    "ScalingType",
    "When",
    "_auto_filter_for_recipe",
    "auto_filter_for_recipe",
    "cast_weights_once",
    "convert_from_float8_training",
    "convert_to_float8_training",
    "describe_backend",
    "describe_path",
    "precompute_float8_dynamic_scale_for_fsdp",
]
