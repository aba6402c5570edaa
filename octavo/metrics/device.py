"""The device of this process: its peak FLOP/s, its memory in use, and the dtype to compute in.

Peaks are dense FLOP/s from the vendors' data sheets (`octavo/roofline/devices.py`). A GPU that is not in the
table has no peak, so no MFU is reported. A CPU's data sheet has no usable figure, so its peak is measured
with a float32 matrix product.
"""

import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.core.host_memory import host_memory
from octavo.core.logging import logger
from octavo.roofline.devices import gpu_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FEW_THREADS = 4


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s for MFU (None if unknown) and the source of the figure. by_precision: the known peaks by
    precision ("bfloat16", "float8", "float32").
    """

    flops: float | None
    source: str
    by_precision: Mapping[str, float] = field(default_factory=dict)


def pick_device() -> torch.device:
    """This process's device: its GPU, by LOCAL_RANK, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _measure_cpu_peak() -> float:
    """The best float32 rate of twelve square products, FLOP/s; takes about 0.05 s."""
    n = 512 if torch.get_num_threads() <= _FEW_THREADS else 1024  # many threads need more work
    a, b = torch.randn(n, n), torch.randn(n, n)
    rates = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * n**3 / (time.perf_counter() - start))
    return max(rates)


def peak_flops(device: torch.device) -> Peak:
    """The peak FLOP/s of `device`."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        measured = _measure_cpu_peak()
        source = f"measured on this CPU, float32, {threads} threads in this process"
        return Peak(measured, source, {"float32": measured})
    name = torch.cuda.get_device_name(device)
    gpu = gpu_of(name)
    if gpu is not None:
        source, by_precision = f"dense bfloat16 of {name}, data sheet", {"bfloat16": gpu.bf16}
        if gpu.float8 is not None:
            by_precision["float8"] = gpu.float8
            source += f"; float8 {gpu.float8:.3e}"
        return Peak(gpu.bf16, source, by_precision)
    return Peak(None, f"{name} is not in octavo's table of peaks, so there is no MFU")


def auto_param_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype for `training.mixed_precision_param = auto`, and the reason.

    A CPU computes bfloat16 faster than float32 only with matrix units (AMX): without any bf16 unit it is
    several times slower, and with only AVX-512's dot products it measured slower too. The environment
    variable OCTAVO_CPU_DTYPE overrides the choice, to reproduce another machine's.
    """
    if device.type == "cuda":
        return torch.bfloat16, "the GPU's matrix units compute in bfloat16"
    if override := os.environ.get("OCTAVO_CPU_DTYPE"):
        return DTYPES[override], f"OCTAVO_CPU_DTYPE={override}"
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has bfloat16 matrix units"
    return (
        torch.float32,
        "this CPU has no bfloat16 matrix units, so bfloat16 would be slower; "
        "--training.mixed_precision_param=bfloat16 asks for it all the same",
    )


def choose_param_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The compute dtype for `training.mixed_precision_param`; logs it with the reason."""
    if setting == "auto":
        dtype, reason = auto_param_dtype(device)
    else:
        dtype, reason = DTYPES[setting], "training.mixed_precision_param asks for it"
    logger.info("High precision is %s here: %s", str(dtype).removeprefix("torch."), reason)
    return dtype


def fastest_attention() -> AbstractContextManager[None]:
    """The scope in which scaled_dot_product_attention takes the first backend of this order that applies."""
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


@dataclass(frozen=True)
class DeviceMemory:
    """Memory in use, in GiB and percent of the device's. active_gib: of live tensors, without the allocator's
    cache; num_alloc_retries, num_ooms: since the process began. None and 0 on a CPU.
    """

    gib: float
    percent: float
    active_gib: float | None = None
    active_percent: float | None = None
    num_alloc_retries: int = 0
    num_ooms: int = 0


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def memory_in_use(device: torch.device) -> DeviceMemory:
    """GPU: peak reserved memory since the last call. CPU: current resident memory of this process."""
    if device.type == "cpu":
        total = host_memory()
        used = _resident_bytes()
        return DeviceMemory(used / 2**30, 100 * used / total)
    stats = torch.cuda.memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.reset_peak_memory_stats(device)
    reserved, active = stats.get("reserved_bytes.all.peak", 0), stats.get("active_bytes.all.peak", 0)
    return DeviceMemory(
        reserved / 2**30,
        100 * reserved / total,
        active / 2**30,
        100 * active / total,
        stats.get("num_alloc_retries", 0),
        stats.get("num_ooms", 0),
    )


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
