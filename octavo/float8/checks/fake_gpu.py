"""Traces float8 as on a GPU with fake tensors on the device `cpu`.

An estimate of a job needs the shapes and memory of the GPU path: casts by kernels, which allocate only their
results, and products of float8 operands. Nothing is computed; within `simulate_gpu` operations with the same
operands and results stand for both. `force_kernels` keeps both as they are, for graphs (`traced.py`).
`gather_in_float8` is for float8 gathers, on a GPU or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.fsdp import FSDPModule

from octavo.float8 import gemm_backends
from octavo.float8.casts import gpu_cast
from octavo.float8.distributed.fsdp_gather import HOOKS, Float8GatherHooks, ShardCache, fsdp_parameters
from octavo.float8.gemm_backends import Device, GemmBackend
from octavo.float8.linear import Float8Linear
from octavo.float8.quantize import Quantized
from octavo.float8.recipe import Cast, Gemm

_CUDA = (12, 9)


def _blocks(shape: torch.Size, cast: Cast) -> list[int]:
    return [1 if block < 0 else -(-size // block) for size, block in zip(shape, cast.block, strict=True)]


def _launch(x: Tensor, cast: Cast, rows: bool, columns: bool) -> Any:
    code = torch.uint8 if cast.scale.one_byte else torch.float32
    return tuple(
        (x.new_empty(shape, dtype=cast.dtype), x.new_empty(_blocks(shape, cast), dtype=code))
        if asked
        else None
        for asked, shape in ((rows, x.shape), (columns, x.shape[::-1]))
    )


def _multiply(a: Quantized, b: Quantized, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    one = torch.ones((), device=a.data.device)
    return torch._scaled_mm(a.data, b.data.t(), scale_a=one, scale_b=one, out_dtype=out_dtype)


@contextmanager
def simulate_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Scope in which float8 layers under `FakeTensorMode` run as on a GPU of compute `capability`.

    Call `force_hardware_path` on the model inside it.
    """
    device = Device("cuda", capability, _CUDA)

    def find_fake_backend(gemm: Gemm, _: Any) -> GemmBackend | None:
        backend = find_backend(gemm, device)
        return backend and GemmBackend(backend.name, "cuda", backend.blocks, _multiply)

    find_backend = gemm_backends.find_backend
    has_kernels = capability >= gpu_cast.LEAST_CAPABILITY
    with (
        patch.object(gemm_backends, "find_backend", find_fake_backend),
        patch.object(gpu_cast, "_device_supported", lambda _: has_kernels),
        patch.object(gpu_cast, "_launch", _launch),
    ):
        yield


@contextmanager
def force_kernels(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Scope in which float8 layers are traced with the Triton kernels and products of a GPU of `capability`.

    Needs triton, and `force_hardware_path` on the model. Tensors stay on their device; no kernel can run.
    """
    device, find_backend = Device("cuda", capability, _CUDA), gemm_backends.find_backend
    with (
        patch.object(gemm_backends, "find_backend", lambda gemm, _: find_backend(gemm, device)),
        patch.object(gpu_cast, "_device_supported", lambda _: True),
        patch.object(gpu_cast, "_PLAIN", (*gpu_cast._PLAIN, FakeTensor)),
    ):
        yield


def force_hardware_path(model: nn.Module) -> None:
    """Make float8 layers of `model` use hardware backends that exist, although the tensors are on a CPU."""
    for module in model.modules():
        if isinstance(module, Float8Linear) and module.emulate is None:
            gemms = [gemm for gemm in module.recipe.gemms.values() if gemm.float8]
            device = Device("cuda")
            module.emulate = any(gemm_backends.find_backend(gemm, device) is None for gemm in gemms)


class _Hooks(Float8GatherHooks):
    def __init__(self, plain: Tensor, cast: Cast) -> None:
        self.plain, self.cast, self.cache = plain, cast, ShardCache()


def gather_in_float8(model: nn.Module) -> None:
    """Make FSDP2 gather the fake weights of `model` in float8, for layers configured to do so.

    A fake tensor cannot be a `ShardedWeight`, so the hooks become attributes of the tensor. They are set
    after FSDP2's lazy initialization, which replaces the local tensors.
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
