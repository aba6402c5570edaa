"""A weight that FSDP2 gathered in float8, and that autograd sees as a high-precision parameter.

FSDP2 can gather a weight in float8, but the gathered tensor must still be a parameter: a leaf of the graph
whose gradient is bfloat16 or float32. The gradient of a plain float8 leaf would be cast to float8. So the
gathered weight is an `UnshardedWeight`: a tensor subclass with the dtype that the weight would have had,
float8 data and a scale. Only `Float8Linear` reads those.

It supports views that keep its shape, because autograd, FSDP2 and DTensor create them, and refuses any other
operation. Converting silently to numbers would hide a layer that reads the weight in high precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.float8.quantize import Quantized, dequantize, transposed
from octavo.float8.recipe import Cast

_aten = torch.ops.aten
_ALIASES = frozenset({_aten.detach.default, _aten.alias.default})
_VIEWS = frozenset({_aten.view.default, _aten._unsafe_view.default, _aten.expand.default})


class UnshardedWeight(Tensor):
    """The square cast `cast` of a weight `[N, K]`, with outer dtype `dtype`.

    data_fp8: float8, row-major. scale: as `Quantized.scale`; FSDP2's next gather replaces it.
    """

    data_fp8: Tensor
    scale: Tensor
    cast: Cast

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, dtype: torch.dtype, cast: Cast) -> UnshardedWeight:
        weight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.shape, strides=data.stride(), dtype=dtype, device=data.device
        )
        weight.data_fp8, weight.scale, weight.cast = data, scale, cast
        return weight

    def casts(self) -> tuple[Quantized, Quantized]:
        """The weight as the output's operand `[N, K]` and as grad_input's `[K, N]`."""
        q = Quantized(self.data_fp8, self.scale)
        return q, transposed(q)

    def dequantize(self) -> Tensor:
        """The values of the float8 weight, `[N, K]` in the outer dtype."""
        return dequantize(Quantized(self.data_fp8, self.scale), self.cast.block).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_fp8", "scale"], (self.dtype, self.cast)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> UnshardedWeight:
        dtype, cast = context
        return UnshardedWeight(inner["data_fp8"], inner["scale"], dtype, cast)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UnshardedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, cast={self.cast})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        weight = args[0] if args else None
        if isinstance(weight, UnshardedWeight):
            if (
                func in _ALIASES
                or (func in _VIEWS and _resolved(args[1], weight) == tuple(weight.shape))
                or (func is _aten.as_strided.default and _same_geometry(weight, *args[1:]))
            ):
                return UnshardedWeight(
                    _aten.alias.default(weight.data_fp8), weight.scale, weight.dtype, weight.cast
                )
            if func is _aten.zeros_like.default:  # the gradient of a parameter that received none
                dtype = (kwargs or {}).get("dtype") or weight.dtype
                return torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        raise NotImplementedError(
            f"{func} on a weight that was gathered in float8: only a Float8Linear can read it. If another "
            "module shares this weight, or code reads it between forward and backward, gather in high "
            "precision: enable_fsdp_float8_all_gather=False"
        )


def _resolved(size: Any, weight: UnshardedWeight) -> tuple[int, ...]:
    """`size` with its -1 filled in, or () if it has another number of dimensions than the weight."""
    if len(size) != weight.dim():
        return ()
    if list(size).count(-1) > 1:
        return tuple(size)
    return tuple(own if given == -1 else given for given, own in zip(size, weight.shape, strict=True))


def _same_geometry(weight: UnshardedWeight, size: Any, stride: Any, storage_offset: int | None = 0) -> bool:
    return tuple(size) == tuple(weight.shape) and tuple(stride) == weight.stride() and not storage_offset
