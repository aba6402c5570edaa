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

config.py translates torchao's options to a recipe; grouped.py multiplies the weights of experts as linear.py
does a linear's. The rest makes it fast, distributed and observable:

    casts/         when operands are cast, by which kernel, and how casts are reused; delayed scaling
    kernels/       Triton kernels that cast, bit for bit as quantize.py does
    fused/         norm, SwiGLU and linears with one input, with fewer passes over memory
    compiled/      so that compiled code saves and rounds as eager code does
    distributed/   float8 communication under FSDP2 and tensor parallelism
    health/        measures what casts do to the values of each layer
    checks/        a self-check for a device, and tracing the GPU path without a GPU

api.py lists the public names; docs/float8.md is the user's guide.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.float8.api import *  # noqa: F403
else:
    # At first use, so that importing `octavo.float8.recipe` does not import torch.
    def __getattr__(name: str) -> Any:
        here = Path(__file__).parent
        if (here / f"{name}.py").exists() or (here / name / "__init__.py").exists():
            # A module, perhaps while `api` is importing it: without waiting for `api`.
            return importlib.import_module(f"{__name__}.{name}")
        public = importlib.import_module("octavo.float8.api")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(public, name)  # found without this function from now on
        return value

    def __dir__() -> list[str]:
        return importlib.import_module("octavo.float8.api").__all__
