"""Checks the machine: Python, torch, triton, the driver and its GPUs, a compiler, packages, memory.

This module does not need torch, which may be missing.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from octavo.commands.doctor.findings import Finding, fail, note, ok
from octavo.core.host_memory import host_memory
from octavo.core.programs import missing_cxx
from octavo.data.file_formats import FORMATS
from octavo.launch.launcher import usable_cores

LEAST_PYTHON, LEAST_TORCH, LEAST_TRITON = (3, 11), (2, 11), (3, 6)
_REQUIRED = ("tokenizers", "numpy")
_OPTIONAL = {
    "safetensors": "Hugging Face export and import",
    "datasets": "streaming c4",
    **{row.package: f"reading {' and '.join(row.suffixes)}" for row in FORMATS.values() if row.package},
    "tensorboard": "metrics.enable_tensorboard",
}
_GPU_QUERY = "name,driver_version,memory.total,compute_cap"


def check_machine() -> Iterator[Finding]:
    """Check everything about the machine; each check may need what the ones before it checked."""
    yield _check_python()
    yield from _check_torch()
    yield from _check_gpus()
    yield _check_torchrun()
    yield _check_compiler()
    yield from _check_packages()
    yield ok("CPU", f"{usable_cores()} cores, {host_memory() / 2**30:.0f} GiB of memory")


def version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: (2, 13) for 2.13.0+cpu."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _dotted(least: tuple[int, ...]) -> str:
    return ".".join(map(str, least))


def _check_python() -> Finding:
    message = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < LEAST_PYTHON:
        return fail("Python", message, f"use Python {_dotted(LEAST_PYTHON)} or later")
    return ok("Python", message)


def _check_torch() -> Iterator[Finding]:
    install = f"pip install 'torch>={_dotted(LEAST_TORCH)}'"
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        yield fail("torch", "is not installed", install)
        return
    except Exception as error:  # a broken installation can raise anything
        yield fail("torch", f"is installed, but cannot be imported: {error}", f"{install}, after removing it")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    message = f"{torch.__version__} ({build})"
    if numbers(torch.__version__) < LEAST_TORCH:
        yield fail("torch", message, install)
    else:
        yield ok("torch", message)
    yield _check_triton(cuda=bool(torch.version.cuda))


def _check_triton(*, cuda: bool) -> Finding:
    installed, install = version("triton"), f"pip install 'triton>={_dotted(LEAST_TRITON)}'"
    if installed is None and not cuda:
        return ok("triton", "not installed, and not needed without a GPU")
    if installed is None:
        return note(
            "triton",
            "is not installed: float8 casts on a GPU run in plain PyTorch, with more passes over memory, "
            "and torch.compile has no GPU code",
            install,
        )
    return (
        ok("triton", installed) if numbers(installed) >= LEAST_TRITON else note("triton", installed, install)
    )


def nvidia_smi() -> list[str]:
    """Return the driver's line per GPU: name, driver, MiB, compute capability; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _check_gpus() -> Iterator[Finding]:
    lines = nvidia_smi()
    try:
        torch = importlib.import_module("torch")
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # reported by _check_torch
        visible = 0
    for number, line in enumerate(lines):
        fields = [part.strip() for part in line.split(",")]
        name, driver, mebibytes, capability = (*fields, "?", "?", "?", "?")[:4]
        size = f"{int(mebibytes) / 1024:.0f} GiB" if mebibytes.isdecimal() else "memory unknown"
        yield ok(f"GPU {number}", f"{name}, {size}, compute capability {capability}, driver {driver}")
    if lines and not visible:
        yield fail(
            "CUDA",
            f"the driver shows {len(lines)} GPU(s), but torch sees none",
            "install a CUDA build of torch that this driver supports, and check CUDA_VISIBLE_DEVICES",
        )
    elif visible and not lines:
        for number in range(visible):
            yield ok(f"GPU {number}", torch.cuda.get_device_name(number))
    elif not visible:
        yield note("GPU", "none: training runs on the CPU, and float8 is emulated (same numbers, slower)")


def _check_torchrun() -> Finding:
    try:
        spec = importlib.util.find_spec("torch.distributed.run")
        available = spec is not None and importlib.import_module("torch.distributed").is_available()
    except Exception:  # no torch, or a broken one
        available = False
    if not available:
        return fail("torchrun", "torch.distributed is missing", "install torch with distributed support")
    return ok("torchrun", "available (python -m torch.distributed.run)")


def _check_compiler() -> Finding:
    missing = missing_cxx()
    if missing is None:
        return ok("C++", "a compiler starts, for --training.compile on a CPU")
    return note(
        "C++",
        f"{missing!r} does not start, so --training.compile has no CPU code",
        "apt install g++ (macOS: xcode-select --install), or set CXX to another compiler",
    )


def _check_packages() -> Iterator[Finding]:
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        yield fail("packages", f"not installed: {', '.join(missing)}", "pip install 'octavo[train]'")
    else:
        yield ok("packages", ", ".join(f"{name} {version(name)}" for name in _REQUIRED))
    for name, use in _OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield note("packages", f"{name} is not installed ({use})", f"pip install {name}")
