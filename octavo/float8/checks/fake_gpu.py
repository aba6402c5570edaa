"""Float8 as on a GPU, for tensors without memory that call themselves CPU tensors.

An estimate of a job wants the shapes and the memory of a GPU's way: casts by kernels, which make nothing but
their results, and products of float8 operands. Neither is computed here; within `as_on_a_gpu` both are
shown by operations with the right operands and results. `gather_in_float8` is for float8 gathers, on a GPU or
not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from octavo.float8 import matmul
from octavo.float8.casts import gpu_cast
from octavo.float8.distributed.fsdp_gather import HOOKS, GatherHooks, Known, fsdp_parameters
from octavo.float8.linear import Float8Linear
from octavo.float8.quantize import Quantized
from octavo.float8.recipe import Cast, Gemm

_CUDA = (12, 9)


def _blocks(shape: torch.Size, cast: Cast) -> list[int]:
    return [1 if block < 0 else -(-size // block) for size, block in zip(shape, cast.block, strict=True)]


def _launch(x: Tensor, cast: Cast, rows: bool, columns: bool) -> Any:
    code = torch.uint8 if cast.scale.one_byte else torch.float32
    made = []
    for wanted, shape in ((rows, x.shape), (columns, x.shape[::-1])):
        pair = None
        if wanted:
            pair = x.new_empty(shape, dtype=cast.dtype), x.new_empty(_blocks(shape, cast), dtype=code)
        made.append(pair)
    return tuple(made)


def _multiply(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    one = torch.ones((), device=a.data.device)
    return torch._scaled_mm(a.data, b.data.t(), scale_a=one, scale_b=one, out_dtype=out_dtype)


@contextmanager
def as_on_a_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """A scope in which float8 layers under `FakeTensorMode` do as on a GPU of compute `capability`.

    Their modules must have gone through `expect_hardware` in it.
    """
    device = matmul.Device("cuda", capability, _CUDA)

    def find_path(gemm: Gemm, _: Any) -> matmul.Path | None:
        found = real_path(gemm, device)
        return found and matmul.Path(found.name, "cuda", found.blocks, _multiply)

    real_path = matmul.find_path
    before = gpu_cast._device_serves, gpu_cast._launch
    casts = capability >= gpu_cast.LEAST_CAPABILITY
    replaced: Any = gpu_cast
    replaced._device_serves, replaced._launch = lambda _: casts, _launch
    paths: Any = matmul
    paths.find_path = find_path
    try:
        yield
    finally:
        replaced._device_serves, replaced._launch = before
        paths.find_path = real_path


def expect_hardware(model: nn.Module) -> None:
    """Let float8 layers of `model` multiply in hardware although their tensors are a CPU's, where it is
    known.
    """
    for module in model.modules():
        if isinstance(module, Float8Linear) and module.emulate is None:
            gemms = [gemm for gemm in module.recipe.gemms.values() if gemm.float8]
            device = matmul.Device("cuda")
            module.emulate = any(matmul.find_path(gemm, device) is None for gemm in gemms)


class _Hooks(GatherHooks):
    def __init__(self, plain: Tensor, cast: Cast) -> None:
        self.plain, self.cast, self.known = plain, cast, Known()


def gather_in_float8(model: nn.Module) -> None:
    """Let FSDP2 gather in float8 the weights without memory of those layers of `model` that ask for it.

    Such a tensor cannot be of the class that has the hooks, so they hang on the tensor itself; not before
    FSDP2 has laid out its shards for the first step, since it puts other tensors in their places then.
    """
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()
    layers = {m for m in model.modules() if isinstance(m, Float8Linear) and m.gathers_float8}
    for _, parameter in fsdp_parameters(layers):
        layer, local = parameter._module_info.module, parameter.sharded_param._local_tensor
        if parameter.sharded_param is not layer.weight:
            continue
        hooks = _Hooks(local.detach(), layer.recipe.output.b)
        setattr(local, HOOKS, hooks)
        local.fsdp_pre_all_gather = hooks.fsdp_pre_all_gather
        local.fsdp_post_all_gather = hooks.fsdp_post_all_gather
