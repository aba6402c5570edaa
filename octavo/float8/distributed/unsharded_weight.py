"""A weight that is float8 inside and high precision to everybody else.

FSDP2 can gather a weight in float8, but what it puts on the module must still be a parameter: a leaf of the
graph whose gradient is bfloat16 or float32. A plain float8 leaf would have its gradient cast to float8. So
the gathered weight is an `UnshardedWeight`: its dtype is the high-precision one that the weight would have
had, its contents are float8 data and a scale, and only `octavo.float8.linear.multiply` looks inside.

It knows views that keep its shape, since autograd, FSDP2 and DTensor make those, and refuses any other
operation: a carrier that quietly turned into numbers would hide a layer that reads the weight in high
precision.
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
    """`[N, K]` of dtype `dtype` to look at; the square cast `cast` of a weight inside.

    data: float8, row-major. scale: as `Quantized.scale`; it may be replaced by that of newly gathered data.
    """

    data_fp8: Tensor
    scale: Tensor
    cast: Cast

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, dtype: torch.dtype, cast: Cast) -> UnshardedWeight:
        carrier = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.shape, strides=data.stride(), dtype=dtype, device=data.device
        )
        carrier.data_fp8, carrier.scale, carrier.cast = data, scale, cast
        return carrier

    def casts(self) -> tuple[Quantized, Quantized]:
        """The weight as the output's operand `[N, K]` and as grad_input's `[K, N]`."""
        q = Quantized(self.data_fp8, self.scale)
        return q, transposed(q)

    def dequantize(self) -> Tensor:
        """What the float8 numbers stand for, `[N, K]` in the outer dtype."""
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
        carrier = args[0] if args else None
        if isinstance(carrier, UnshardedWeight):
            if (
                func in _ALIASES
                or (func in _VIEWS and _resolved(args[1], carrier) == tuple(carrier.shape))
                or (func is _aten.as_strided.default and _same_geometry(carrier, *args[1:]))
            ):
                return UnshardedWeight(
                    _aten.alias.default(carrier.data_fp8), carrier.scale, carrier.dtype, carrier.cast
                )
            if func is _aten.zeros_like.default:  # the gradient of a parameter that got none
                dtype = (kwargs or {}).get("dtype") or carrier.dtype
                return torch.zeros(carrier.shape, dtype=dtype, device=carrier.device)
        raise NotImplementedError(
            f"{func} on a weight that was gathered in float8: only a Float8Linear can read it. If another "
            "module shares this weight, or code reads it between forward and backward, gather in high "
            "precision: enable_fsdp_float8_all_gather=False"
        )


def _resolved(size: Any, carrier: UnshardedWeight) -> tuple[int, ...]:
    """`size` with its -1 filled in, where it has as many dimensions as the carrier."""
    if len(size) != carrier.dim():
        return ()
    known = [n for n in size if n != -1]
    if len(known) < len(size) - 1:
        return tuple(size)
    return tuple(have if want == -1 else want for want, have in zip(size, carrier.shape, strict=True))


def _same_geometry(carrier: UnshardedWeight, size: Any, stride: Any, storage_offset: int | None = 0) -> bool:
    return tuple(size) == tuple(carrier.shape) and tuple(stride) == carrier.stride() and not storage_offset
