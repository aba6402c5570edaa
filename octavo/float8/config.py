"""torchao.float8's options, mapped onto a `Recipe`.

Names and defaults are torchao's, so that a user of torchao changes only an import. Extensions keep its
numbers by default: `emulate=None` uses hardware if there is a backend, and granularities include blocks. The
price is a second way to say what a `Recipe` says; `to_recipe` and `from_recipe` translate between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Final

import torch

from octavo.float8.recipe import FULL, RECIPES, Cast, Gemm, Recipe, ScaleFormat, check_type, find_recipe

e4m3_dtype: Final = torch.float8_e4m3fn
e5m2_dtype: Final = torch.float8_e5m2


class ScalingType(Enum):
    """DYNAMIC: the scale comes from the tensor being cast. DISABLED: the tensor stays in high precision."""

    DYNAMIC = "dynamic"
    DISABLED = "disabled"

    def short_str(self) -> str:
        return self.value[:3]


class ScalingGranularity(Enum):
    """Which elements share a scale: a tensor, a slice along the contraction, or a block."""

    TENSORWISE = "tensorwise"
    AXISWISE = "axiswise"
    BLOCKWISE_1X128 = "blockwise_1x128"
    BLOCKWISE_128X128 = "blockwise_128x128"
    MX_1X32 = "mx_1x32"

    def short_str(self) -> str:
        return {"tensorwise": "ten", "axiswise": "axs"}.get(self.value, self.value.split("_")[1])

    @property
    def block(self) -> tuple[int, int]:
        """(rows, contraction), as in `Cast.block`."""
        return _BLOCKS[self]


_BLOCKS: Final = {
    ScalingGranularity.TENSORWISE: (FULL, FULL),
    ScalingGranularity.AXISWISE: (1, FULL),
    ScalingGranularity.BLOCKWISE_1X128: (1, 128),
    ScalingGranularity.BLOCKWISE_128X128: (128, 128),
    ScalingGranularity.MX_1X32: (1, 32),
}
_GRANULARITIES: Final = {block: granularity for granularity, block in _BLOCKS.items()}


@dataclass(frozen=True)
class CastConfig:
    """How one tensor is cast. `target_dtype=None` means e4m3, or e5m2 for `grad_output`."""

    scaling_type: ScalingType = ScalingType.DYNAMIC
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    target_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_type(self, "scaling_type", ScalingType)
        check_type(self, "scaling_granularity", ScalingGranularity)
        if self.target_dtype is not None:
            Cast(self.target_dtype, (FULL, FULL))  # raises on a dtype that is not float8
        if (
            self.scaling_type is ScalingType.DISABLED
            and self.scaling_granularity is not ScalingGranularity.TENSORWISE
        ):
            raise ValueError(
                f"CastConfig is DISABLED with scaling_granularity={self.scaling_granularity.name}: "
                "a tensor that stays in high precision has no scales; leave scaling_granularity out"
            )

    def short_str(self) -> str:
        dtype = {None: "auto", e4m3_dtype: "e4m3", e5m2_dtype: "e5m2"}[self.target_dtype]
        return f"{self.scaling_type.short_str()}_{self.scaling_granularity.short_str()}_{dtype}"


@dataclass(frozen=True)
class Float8GemmConfig:
    """`use_fast_accum`: allow the hardware to accumulate in less than float32; emulation never does."""

    use_fast_accum: bool = False

    def __post_init__(self) -> None:
        check_type(self, "use_fast_accum", bool)


class Float8LinearRecipeName(Enum):
    """The names of the recipes in `octavo.float8.RECIPES`, as torchao writes them: `ROWWISE`."""

    _ignore_ = "members name"
    members = vars()
    for name in RECIPES:
        members[name.upper()] = name


@dataclass(frozen=True)
class Float8LinearConfig:
    """How `torch.nn.Linear` becomes float8.

    cast_config_*: the six operands. None copies the configuration of the same tensor's first use; a missing
        dtype means e4m3, or e5m2 for grad_output.
    gemm_config_*: the three products.
    enable_fsdp_float8_all_gather: FSDP2 gathers weights in float8 (recipes whose weight cast is square).
    pad_inner_dim: accepted for compatibility; operands are always padded to sizes the hardware supports.
    emulate: True multiplies the float8 operands in float32; False requires hardware and raises without it;
        None uses hardware if there is a backend.
    round_scales_to_power_of_2: round scales down to powers of two. (MXFP8's always are.)
    recipe: a recipe of your own, in place of the six casts, the three products and the rounding.

    Raises ValueError for products that no backend computes.
    """

    cast_config_input: CastConfig = CastConfig()
    cast_config_input_for_grad_weight: CastConfig | None = None
    cast_config_weight: CastConfig = CastConfig()
    cast_config_weight_for_grad_input: CastConfig | None = None
    cast_config_grad_output: CastConfig = CastConfig()
    cast_config_grad_output_for_grad_weight: CastConfig | None = None
    gemm_config_output: Float8GemmConfig = Float8GemmConfig(use_fast_accum=True)
    gemm_config_grad_input: Float8GemmConfig = Float8GemmConfig()
    gemm_config_grad_weight: Float8GemmConfig = Float8GemmConfig()
    enable_fsdp_float8_all_gather: bool = False
    pad_inner_dim: bool = False
    emulate: bool | None = None
    round_scales_to_power_of_2: bool = False
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        for name in ("input", "weight", "grad_output"):
            check_type(self, f"cast_config_{name}", CastConfig)
        for name in ("input_for_grad_weight", "weight_for_grad_input", "grad_output_for_grad_weight"):
            check_type(self, f"cast_config_{name}", CastConfig, None)
        for name in ("output", "grad_input", "grad_weight"):
            check_type(self, f"gemm_config_{name}", Float8GemmConfig)
        for name in ("enable_fsdp_float8_all_gather", "pad_inner_dim", "round_scales_to_power_of_2"):
            check_type(self, name, bool)
        check_type(self, "emulate", bool, None)
        check_type(self, "recipe", Recipe, None)
        if self.recipe is None:
            self._fill_in()
        else:
            self._check_recipe_alone()
        recipe = self.to_recipe()  # raises where a product cannot be computed
        if self.enable_fsdp_float8_all_gather and not recipe.gatherable:
            raise ValueError(
                "enable_fsdp_float8_all_gather needs one float8 weight that serves both products, cast in "
                f"square blocks; here {_block(recipe.output.b)} serve the output and "
                f"{_block(recipe.grad_input.b)} serve grad_input. Use the recipe tensorwise or blockwise, or "
                "gather in high precision"
            )

    def _check_recipe_alone(self) -> None:
        casts = [f for f in fields(self) if f.name.startswith(("cast_", "gemm_", "round_"))]
        others = [f.name for f in casts if getattr(self, f.name) != f.default]
        if others:
            raise ValueError(
                f"recipe defines every cast, and {others[0]} was given as well: leave one of them out"
            )

    def _fill_in(self) -> None:
        defaults = {"input": e4m3_dtype, "weight": e4m3_dtype, "grad_output": e5m2_dtype}
        seconds = {"input": "grad_weight", "weight": "grad_input", "grad_output": "grad_weight"}
        for tensor, default in defaults.items():
            name = f"cast_config_{tensor}"
            first = getattr(self, name)
            second = getattr(self, f"{name}_for_{seconds[tensor]}")
            second = first if second is None else second
            dtypes = {c.target_dtype for c in (first, second) if c.target_dtype is not None} or {default}
            if len(dtypes) > 1:
                raise ValueError(
                    f"{name} casts to {first.target_dtype} and {name}_for_{seconds[tensor]} to "
                    f"{second.target_dtype}: a tensor goes into both products as one dtype"
                )
            (dtype,) = dtypes
            # The dataclass is frozen: fill the defaults in as though the caller had given them.
            object.__setattr__(self, name, replace(first, target_dtype=dtype))
            object.__setattr__(self, f"{name}_for_{seconds[tensor]}", replace(second, target_dtype=dtype))

    def to_recipe(self) -> Recipe:
        """The recipe that these options describe."""
        if self.recipe is not None:
            return self.recipe

        def operand(config: CastConfig | None) -> Cast | None:
            assert config is not None
            assert config.target_dtype is not None
            if config.scaling_type is ScalingType.DISABLED:
                return None
            scale = ScaleFormat.POW2 if self.round_scales_to_power_of_2 else ScaleFormat.FP32
            if config.scaling_granularity is ScalingGranularity.MX_1X32:
                scale = ScaleFormat.E8M0
            return Cast(config.target_dtype, config.scaling_granularity.block, scale)

        gemms = {
            "output": (self.cast_config_input, self.cast_config_weight, self.gemm_config_output),
            "grad_input": (
                self.cast_config_grad_output,
                self.cast_config_weight_for_grad_input,
                self.gemm_config_grad_input,
            ),
            "grad_weight": (
                self.cast_config_grad_output_for_grad_weight,
                self.cast_config_input_for_grad_weight,
                self.gemm_config_grad_weight,
            ),
        }
        parts = {}
        for name, (a, b, gemm) in gemms.items():
            try:
                parts[name] = Gemm(operand(a), operand(b), gemm.use_fast_accum)
            except ValueError as error:
                raise ValueError(f"the product for {name}: {error}") from None
        recipe = Recipe("custom", **parts)
        return next((r for r in _named() if replace(r, name="custom") == recipe), recipe)

    @staticmethod
    def from_recipe(
        recipe: Recipe, *, emulate: bool | None = None, enable_fsdp_float8_all_gather: bool = False
    ) -> Float8LinearConfig:
        """The options for `recipe`: one per cast if the options can express it, else in `recipe`."""
        whole = Float8LinearConfig(
            recipe=recipe, emulate=emulate, enable_fsdp_float8_all_gather=enable_fsdp_float8_all_gather
        )
        casts = [c for gemm in recipe.gemms.values() for c in (gemm.a, gemm.b) if c is not None]

        def options(cast: Cast | None, dtype: torch.dtype | None) -> CastConfig:
            if cast is None:
                return CastConfig(ScalingType.DISABLED, target_dtype=dtype)
            return CastConfig(scaling_granularity=_GRANULARITIES[cast.block], target_dtype=dtype)

        def dtype_of(first: Cast | None, second: Cast | None) -> torch.dtype | None:
            return first.dtype if first is not None else second.dtype if second is not None else None

        if any(cast.block not in _GRANULARITIES for cast in casts):
            return whole
        o, gi, gw = recipe.output, recipe.grad_input, recipe.grad_weight
        x, w, dy = dtype_of(o.a, gw.b), dtype_of(o.b, gi.b), dtype_of(gi.a, gw.a)
        config = Float8LinearConfig(
            cast_config_input=options(o.a, x),
            cast_config_input_for_grad_weight=options(gw.b, x),
            cast_config_weight=options(o.b, w),
            cast_config_weight_for_grad_input=options(gi.b, w),
            cast_config_grad_output=options(gi.a, dy),
            cast_config_grad_output_for_grad_weight=options(gw.a, dy),
            gemm_config_output=Float8GemmConfig(o.fast_accum),
            gemm_config_grad_input=Float8GemmConfig(gi.fast_accum),
            gemm_config_grad_weight=Float8GemmConfig(gw.fast_accum),
            emulate=emulate,
            enable_fsdp_float8_all_gather=enable_fsdp_float8_all_gather,
            round_scales_to_power_of_2=any(c.scale is ScaleFormat.POW2 for c in casts),
        )
        return config if replace(config.to_recipe(), name=recipe.name) == recipe else whole

    @staticmethod
    def from_recipe_name(recipe_name: Float8LinearRecipeName | str) -> Float8LinearConfig:
        """The options of a named recipe. Raises ValueError, with the valid names, for any other name."""
        name = recipe_name.value if isinstance(recipe_name, Float8LinearRecipeName) else recipe_name
        return Float8LinearConfig.from_recipe(find_recipe(name))


def _block(cast: Cast | None) -> str:
    return "high-precision weights" if cast is None else cast.blocks


def _named() -> tuple[Recipe, ...]:
    return tuple(find_recipe(name.value) for name in Float8LinearRecipeName)


Options = Float8LinearConfig | Float8LinearRecipeName | Recipe | str
"""Anything that selects a recipe: the options, a recipe, or its name."""


def resolve(
    config: Options | None,
) -> tuple[Recipe, Float8LinearConfig | None]:
    """The recipe that `config` selects (None: tensorwise), and the options, unless `config` is a `Recipe`."""
    if config is None:
        config = Float8LinearConfig()
    if isinstance(config, Float8LinearConfig):
        return config.to_recipe(), config
    if isinstance(config, Float8LinearRecipeName):
        config = config.value
    if isinstance(config, str):
        return find_recipe(config), Float8LinearConfig.from_recipe_name(config)
    if isinstance(config, Recipe):
        return config, None
    raise TypeError(
        f"config is a {type(config).__name__}; it must be a Float8LinearConfig, a Recipe, or a recipe's name"
    )
