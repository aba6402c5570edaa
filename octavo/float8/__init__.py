"""octavo.float8: float8 training for the linear layers of any PyTorch model.

    from octavo.float8 import convert_to_float8_training
    convert_to_float8_training(model, config="rowwise")

The story is in six files, in this order:

    recipe.py      a recipe: which of the six operands of a linear layer are cast, and how, as plain data
    quantize.py    a cast: scales and float8 codes, in plain PyTorch
    matmul.py      a product of float8 operands, in hardware (gemm_backends.py) or in emulation
    product.py     the autograd function of a linear layer: three such products
    linear.py      `Float8Linear`: casts its input, takes its weight's casts, multiplies
    convert.py     swaps a model's `nn.Linear`s for `Float8Linear`s, and filters them

config.py translates torchao's options to a recipe. The rest makes it fast, distributed and observable:

    casts/         when operands are cast, by which kernel, and how casts are reused; delayed scaling
    kernels/       Triton kernels that cast, bit for bit as quantize.py does
    fused/         norm, SwiGLU and linears with one input, with fewer passes over memory
    compiled/      so that compiled code saves and rounds as eager code does
    distributed/   float8 communication under FSDP2 and tensor parallelism
    health/        measures what casts do to the values of each layer
    checks/        a self-check for a device, and tracing the GPU path without a GPU

docs/float8.md is the user's guide.
"""

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
