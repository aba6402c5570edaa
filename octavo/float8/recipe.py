"""Recipes: which operands of a linear layer are cast to float8, and how. Read this file first.

A linear layer is three matrix products. With M tokens, K input features and N output features:

    output       y[M, N]  = x[M, K]  . w[N, K]^T      contracts K
    grad_input   dx[M, K] = dy[M, N] . w[K, N]^T      contracts N
    grad_weight  dw[N, K] = dy[N, M] . x[K, M]^T      contracts M

Every operand is written `[rows, contraction]`, the contraction last. Hopper's float8 units read both operands
in this layout only, and it makes axes unambiguous: a scaling scheme is the size of the block of elements that
share a scale.

    scheme                         block = (rows, contraction)
    one scale per tensor           (FULL, FULL)
    one scale per row              (1, FULL)
    128-blocks, activation/weight  (1, 128) / (128, 128)
    MXFP8                          (1, 32), power-of-two scale in one byte

The trade-off: fewer elements per scale keep an outlier from flushing others to zero, but cost more scales and
slower products.

A recipe is six casts, as plain data without tensors: `quantize.py` interprets a `Cast`, `matmul.py` a `Gemm`
and `product.py` a `Recipe`. To add a recipe, add a row to `RECIPES`. It trains in emulation at once, and in
hardware once `gemm_backends.py` has a row for it. This file does not import torch, so that a job's options
can be checked against it in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

FULL: Final = -1
"""Block size of an axis that is one block from end to end."""


class Float8Format(Enum):
    """The float8 formats, by the names of their torch dtypes. E4M3 is finer, E5M2 has the wider range."""

    E4M3 = "float8_e4m3fn"
    E5M2 = "float8_e5m2"


def check_type(holder: object, name: str, kind: type, *others: object) -> None:
    """Raise TypeError unless the attribute called `name` is of type `kind` or one of `others`."""
    value = getattr(holder, name)
    if not isinstance(value, kind) and not any(value is other for other in others):
        expected = " or ".join([kind.__name__, *map(str, others)])
        raise TypeError(f"{type(holder).__name__}.{name} is {value!r}; it must be a {expected}")


class ScaleFormat(Enum):
    """Which numbers a scale may be.

    FP32: any float32. POW2: a float32 power of two, so that scaling never rounds; the largest that does not
    overflow the block. E8M0 and E8M0_FLOOR: a power of two in one byte, as in the OCP Microscaling
    specification v1.0. E8M0 rounds up, so that nothing saturates. E8M0_FLOOR takes the exponent of the
    largest element, as the specification's example does, so that elements above 1.75 times a power of two
    saturate.
    """

    FP32 = "fp32"
    POW2 = "pow2"
    E8M0 = "e8m0"
    E8M0_FLOOR = "e8m0_floor"

    @property
    def one_byte(self) -> bool:
        """Whether a scale is stored as a one-byte exponent."""
        return self in (ScaleFormat.E8M0, ScaleFormat.E8M0_FLOOR)


class When(Enum):
    """When the maximum that determines a scale was measured.

    JUST_IN_TIME: on the tensor being cast, which must be read before it can be cast. PREVIOUS_STEP: on the
    same operand in the previous step (delayed scaling, `casts/delayed_scaling.py`); just in time if there is
    none.
    """

    JUST_IN_TIME = "just in time"
    PREVIOUS_STEP = "previous step"


@dataclass(frozen=True)
class Cast:
    """How one operand becomes low precision.

    `format`: a `Float8Format`, or its torch dtype, which is converted; `dtype` gives the dtype. `block`:
    (rows, contraction) elements that share a scale, each a positive number or FULL. `scale`: the numbers a
    scale may be. `scaled`: False makes every scale 1, so that values outside the type's range are lost; a
    negative control, without kernels. `when`: when its maximum was measured; PREVIOUS_STEP requires one scale
    per tensor.
    """

    format: Float8Format | torch.dtype
    block: tuple[int, int]
    scale: ScaleFormat = ScaleFormat.FP32
    scaled: bool = True
    when: When = When.JUST_IN_TIME

    def __post_init__(self) -> None:
        if not isinstance(self.format, Float8Format):
            try:
                object.__setattr__(self, "format", Float8Format(str(self.format).removeprefix("torch.")))
            except ValueError:
                names = " or ".join(f"torch.{known.value}" for known in Float8Format)
                raise ValueError(f"Cast.format is {self.format}; it must be {names}") from None
        if (
            not isinstance(self.block, tuple)
            or len(self.block) != 2
            or any(not isinstance(b, int) or (b < 1 and b != FULL) for b in self.block)
        ):
            raise ValueError(
                f"Cast.block is {self.block!r}; it must be a tuple (rows, contraction), each >= 1 or FULL "
                f"({FULL})"
            )
        check_type(self, "scale", ScaleFormat)
        check_type(self, "scaled", bool)
        if not self.scaled and self.scale.one_byte:
            raise ValueError(f"Cast.scale is {self.scale} of a cast without scales; leave it out")
        check_type(self, "when", When)
        if self.when is When.PREVIOUS_STEP and (
            self.block != (FULL, FULL) or self.scale.one_byte or not self.scaled
        ):
            raise ValueError(
                f"Cast takes the previous step's maximum for {self.blocks} and {self.scale}; that is "
                "supported for one float32 scale per tensor only: use When.JUST_IN_TIME"
            )

    @property
    def dtype(self) -> torch.dtype:
        import torch

        assert isinstance(self.format, Float8Format)
        dtype: torch.dtype = getattr(torch, self.format.value)
        return dtype

    @property
    def square(self) -> bool:
        """Whether casting commutes with transposing, so that one cast serves a tensor and its transpose."""
        return self.block[0] == self.block[1]

    @property
    def power_of_two(self) -> bool:
        """Whether every scale is a power of two, so that multiplying by it never rounds."""
        return self.scale is not ScaleFormat.FP32 or not self.scaled

    @property
    def blocks(self) -> str:
        """The block in words, for messages: "blocks of 1 x FULL"."""
        return f"blocks of {self._sizes}"

    @property
    def short(self) -> str:
        """Format and block, as `repr` of a layer has them: "e4m3[1 x FULL]"."""
        assert isinstance(self.format, Float8Format)
        return f"{self.format.name.lower()}[{self._sizes}]"

    @property
    def _sizes(self) -> str:
        return " x ".join("FULL" if size == FULL else str(size) for size in self.block)


@dataclass(frozen=True)
class Gemm:
    """How the operands of one product `a[rows, contraction] . b[rows, contraction]^T` are cast.

    Operands stay in high precision if both are None. `fast_accum` allows the hardware to accumulate in less
    than float32; emulation always accumulates in float32.
    """

    a: Cast | None
    b: Cast | None
    fast_accum: bool = False

    def __post_init__(self) -> None:
        check_type(self, "a", Cast, None)
        check_type(self, "b", Cast, None)
        check_type(self, "fast_accum", bool)
        if (self.a is None) != (self.b is None):
            raise ValueError(
                f"Gemm has one operand in float8 and one in high precision (a={self.a}, b={self.b}); "
                "no backend multiplies such a pair: cast both, or neither"
            )
        if self.a and self.b and self.a.format is self.b.format is Float8Format.E5M2:
            raise ValueError(
                "Gemm multiplies float8_e5m2 by float8_e5m2, which no hardware does: "
                "use torch.float8_e4m3fn for at least one operand (usually the input and the weight)"
            )

    @property
    def float8(self) -> bool:
        return self.a is not None

    @property
    def short(self) -> str:
        """Both casts: "e4m3[1 x 128] . e4m3[128 x 128]"."""
        return f"{self.a.short} . {self.b.short}" if self.a and self.b else "high precision"


@dataclass(frozen=True)
class Recipe:
    """How the three products of a linear layer are computed; letters as in the module's docstring.

    output:         a casts x[M, K]     b casts w[N, K]
    grad_input:     a casts dy[M, N]    b casts w[K, N], the transpose
    grad_weight:    a casts dy[N, M]    b casts x[K, M], both transposes
    """

    name: str
    output: Gemm
    grad_input: Gemm
    grad_weight: Gemm

    def __post_init__(self) -> None:
        check_type(self, "name", str)
        for gemm in ("output", "grad_input", "grad_weight"):
            check_type(self, gemm, Gemm)

    @property
    def gatherable(self) -> bool:
        """Whether FSDP can gather the weight in float8: one float8 weight serves both its products."""
        weight = self.output.b
        return weight is not None and weight.square and weight == self.grad_input.b

    @property
    def gemms(self) -> Mapping[str, Gemm]:
        return {"output": self.output, "grad_input": self.grad_input, "grad_weight": self.grad_weight}

    def map_casts(self, change: Callable[[Cast], Cast]) -> Recipe:
        """A copy with `change` applied to every cast."""

        def gemm(g: Gemm) -> Gemm:
            return replace(g, a=g.a and change(g.a), b=g.b and change(g.b))

        return replace(
            self,
            output=gemm(self.output),
            grad_input=gemm(self.grad_input),
            grad_weight=gemm(self.grad_weight),
        )

    def with_scales(self, scale: ScaleFormat) -> Recipe:
        """A copy with scale format `scale` in every cast: `RECIPES["mxfp8"].with_scales(E8M0_FLOOR)`."""
        return self.map_casts(lambda cast: replace(cast, scale=scale))


_E4M3, _E5M2 = Float8Format.E4M3, Float8Format.E5M2
_HIGH_PRECISION: Final = Gemm(None, None)

_TENSOR = Cast(_E4M3, (FULL, FULL))
_TENSOR_GRAD = Cast(_E5M2, (FULL, FULL))
_TENSOR_DELAYED = replace(_TENSOR, when=When.PREVIOUS_STEP)
_TENSOR_GRAD_DELAYED = replace(_TENSOR_GRAD, when=When.PREVIOUS_STEP)
_TENSOR_POW2 = replace(_TENSOR, scale=ScaleFormat.POW2)
_ROW = Cast(_E4M3, (1, FULL), ScaleFormat.POW2)
_BLOCK = Cast(_E4M3, (1, 128))
_BLOCK_WEIGHT = Cast(_E4M3, (128, 128))
_MX = Cast(_E4M3, (1, 32), ScaleFormat.E8M0)

RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            # One scale per tensor; e5m2 fits the gradient's wide range. The fastest.
            Recipe(
                "tensorwise",
                output=Gemm(_TENSOR, _TENSOR, fast_accum=True),
                grad_input=Gemm(_TENSOR_GRAD, _TENSOR),
                grad_weight=Gemm(_TENSOR_GRAD, _TENSOR),
            ),
            # One power-of-two scale per row: an outlier token or channel harms only itself.
            Recipe(
                "rowwise",
                output=Gemm(_ROW, _ROW, fast_accum=True),
                grad_input=Gemm(_ROW, _ROW),
                grad_weight=Gemm(_ROW, _ROW),
            ),
            # Like rowwise, but grad_weight, the product most sensitive to noise, in high precision.
            Recipe(
                "rowwise_with_gw_hp",
                output=Gemm(_ROW, _ROW, fast_accum=True),
                grad_input=Gemm(_ROW, _TENSOR_POW2),
                grad_weight=_HIGH_PRECISION,
            ),
            # DeepSeek-V3 (arXiv:2412.19437, section 3.3): fine blocks, float32 scales.
            Recipe(
                "blockwise",
                output=Gemm(_BLOCK, _BLOCK_WEIGHT),
                grad_input=Gemm(_BLOCK, _BLOCK_WEIGHT),
                grad_weight=Gemm(_BLOCK, _BLOCK),
            ),
            # OCP Microscaling v1.0: 32 elements share a one-byte exponent.
            Recipe(
                "mxfp8",
                output=Gemm(_MX, _MX),
                grad_input=Gemm(_MX, _MX),
                grad_weight=Gemm(_MX, _MX),
            ),
            # Delayed scaling: tensorwise with the previous step's maxima, so one read of each input and
            # gradient. A weight is cast once per step, so its own maximum costs next to nothing.
            Recipe(
                "tensorwise_previous_step",
                output=Gemm(_TENSOR_DELAYED, _TENSOR, fast_accum=True),
                grad_input=Gemm(_TENSOR_GRAD_DELAYED, _TENSOR),
                grad_weight=Gemm(_TENSOR_GRAD_DELAYED, _TENSOR_DELAYED),
            ),
        )
    }
)


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError, with the valid names, if there is none."""
    try:
        return RECIPES[name]
    except (KeyError, TypeError):  # TypeError: a list, say
        raise ValueError(
            f"no float8 recipe is called {name!r}; the recipes are {', '.join(RECIPES)}"
        ) from None
