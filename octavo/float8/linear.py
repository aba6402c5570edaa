"""`Float8Linear`: `nn.Linear` whose three products run in float8. What a call does:

    cast the input     x[M, K] as x_MK for the output and as x_KM for grad_weight: `casts/operands.py`
    take the weight    as w_NK for the output and as w_KN for grad_input: cast now, or earlier in this step
                       (`casts/weight_cache.py`), or gathered in float8 (`distributed/fsdp_gather.py`)
    multiply           by an autograd function, which casts the gradient: `product.py`

Letters as in `recipe.py`: M tokens, K input features, N output features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from octavo.float8.casts.operands import LayerStatistics, cast_input, weight_operands
from octavo.float8.casts.weight_cache import WeightCache
from octavo.float8.config import Options, resolve
from octavo.float8.distributed.dtensor_io import LocalInput, local_input, output_dtensor
from octavo.float8.distributed.fsdp_gather import plain_parameter, shard_in_float8
from octavo.float8.matmul import warn_if_emulated
from octavo.float8.product import ProductSpec, finish, multiply, prepare_input


class Float8Linear(nn.Linear):
    """`nn.Linear` whose three products run in float8. `config`: options, a `Recipe`, or a recipe's name.

    Parameters, state dict and signature are those of `nn.Linear`. Takes `[..., in_features]` with any number
    of leading dimensions, in bfloat16, float16 or float32, and returns `[..., out_features]` in the same
    dtype (under autocast, in autocast's).

    `keep_input`: whether compiled code must save the input's cast for backward. If False and the input has
    two bytes per element, the compiler may recompute it instead (`convert.py` decides).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: Options | None = None,
        emulate: bool | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe, self.config = resolve(config)
        self.emulate = emulate if self.config is None or emulate is not None else self.config.emulate
        self.weight_cache = WeightCache()
        self.statistics: LayerStatistics | None = None  # set by `DelayedScaling`
        self.watch: Callable[[Tensor, Tensor], Tensor] | None = None  # set on steps that `health` measures
        # Set by tensor parallel styles: whether one applies, and the placement of an output that is a sum.
        self.tensor_parallel = False
        self.output_placement: Placement | None = None
        self.keep_input = True
        self.shared_input: Any = None  # the `fused.SharedInput` that has this linear as a member

    @classmethod
    def from_float(
        cls, mod: nn.Linear, config: Options | None = None, *, emulate: bool | None = None
    ) -> Self:
        """A float8 linear with the parameters of `mod` (shared, not copied), its hooks and buffers."""
        if not isinstance(mod, nn.Linear):
            raise TypeError(f"Float8Linear.from_float takes an nn.Linear, not a {type(mod).__name__}")
        new = cls(
            mod.in_features,
            mod.out_features,
            bias=mod.bias is not None,
            device="meta",
            dtype=mod.weight.dtype,
            config=config,
            emulate=emulate,
        )
        # Parameters, buffers, hooks and any other attributes.
        new.__dict__.update(
            {k: copy.copy(v) if isinstance(v, dict | set) else v for k, v in mod.__dict__.items()}
        )
        warn_if_emulated(new.recipe, mod.weight.device, new.emulate)
        return new

    def to_float(self) -> nn.Linear:
        """A plain `nn.Linear` with the parameters of this one (shared, not copied), its hooks and buffers."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        own = set(Float8Linear(1, 1, device="meta", config=self.recipe).__dict__) - set(plain.__dict__)
        plain.__dict__.update(
            {
                k: copy.copy(v) if isinstance(v, dict | set) else v
                for k, v in self.__dict__.items()
                if k not in own
            }
        )
        return plain

    def forward(self, input: Tensor) -> Tensor:
        """`input[..., K] -> [..., N]`. ValueError for another last dimension, TypeError for other dtypes."""
        x = prepare_input(input, self)
        if not torch.compiler.is_compiling():
            warn_if_emulated(self.recipe, x.device, self.emulate)
        tokens = x.shape[:-1]
        if isinstance(self.weight, DTensor):
            local = local_input(x, self.weight, self.recipe, self.output_placement)
            y_MN = self._multiply(local, self.weight.to_local())
            return output_dtensor(
                y_MN, self.bias, tokens, self.weight.device_mesh, local.sharding, self.output_placement
            )
        x_MK = x.reshape(math.prod(tokens), self.in_features)
        y = finish(self._multiply(LocalInput(x_MK, owner=input), self.weight), tokens, self.bias)
        return y if self.watch is None else self.watch(x, y)

    def _multiply(self, local: LocalInput, weight: Tensor) -> Tensor:
        """`y_MN` of this rank's input and weight."""
        x_MK, owner, x_casts, sharding = local
        statistics = self.statistics or LayerStatistics()
        if x_casts is None:
            x_casts = cast_input(
                x_MK,
                self.recipe,
                for_grad_weight=weight.requires_grad and torch.is_grad_enabled(),
                owner=owner,
                pin=self.keep_input,
                sharded=sharding.input if sharding else None,
                statistics=statistics.input,
            )
        w_NK, w_KN = self.weight_cache.get(self.weight) or weight_operands(weight, self.recipe, sharding)
        spec = ProductSpec(self.recipe, self.emulate, sharding=sharding)
        (product,) = multiply(spec, x_MK, [weight], x_casts, w_NK, [w_KN], statistics.grad_output)
        return product.value

    @property
    def gathers_float8(self) -> bool:
        """Whether FSDP2 gathers the weight in float8."""
        return self.config is not None and self.config.enable_fsdp_float8_all_gather

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets its sharded parameter by assignment.
        if name == "weight" and isinstance(value, DTensor) and self.gathers_float8:
            assert self.recipe.output.b is not None
            shard_in_float8(value, self.recipe.output.b, previous=self._parameters.get("weight"))
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and self.gathers_float8:
            destination[f"{prefix}weight"] = plain_parameter(destination[f"{prefix}weight"])

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have parameters only; a copied cache is empty.
        return self.__dict__ | {"watch": None, "statistics": None, "shared_input": None}

    def extra_repr(self) -> str:
        emulate = "" if self.emulate is None else f", emulate={self.emulate}"
        casts = "".join(f", {name}={gemm.short}" for name, gemm in self.recipe.gemms.items())
        return f"{super().extra_repr()}, recipe={self.recipe.name}{emulate}{casts}"
