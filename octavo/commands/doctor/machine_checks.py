"""The machine: Python, torch, triton, the driver and its GPUs, a compiler, packages, memory. No torch is
needed to look at them, since it may be what is missing.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from octavo.commands.doctor.findings import Finding, fail, note, ok
from octavo.config.programs import missing_cxx

LEAST_PYTHON, LEAST_TORCH, LEAST_TRITON = (3, 11), (2, 11), (3, 6)
_NEEDED = ("tyro", "tokenizers", "numpy")
_OPTIONAL = {
    "safetensors": "Hugging Face export and import",
    "datasets": "streaming c4",
    "pyarrow": "reading .parquet",
    "tensorboard": "metrics.enable_tensorboard",
}
_GPU_QUERY = "name,driver_version,memory.total,compute_cap"


def look() -> Iterator[Finding]:
    """Everything about the machine, in the order in which one thing needs another."""
    yield _python()
    yield from _torch()
    yield from _gpus()
    yield _torchrun()
    yield _compiler()
    yield from _packages()
    yield _memory()


def version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 13) for 2.13.0+cpu."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _dotted(least: tuple[int, ...]) -> str:
    return ".".join(map(str, least))


def _python() -> Finding:
    told = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < LEAST_PYTHON:
        return fail("Python", told, f"use Python {_dotted(LEAST_PYTHON)} or later")
    return ok("Python", told)


def _torch() -> Iterator[Finding]:
    wanted = f"pip install 'torch>={_dotted(LEAST_TORCH)}'"
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        yield fail("torch", "is not installed", wanted)
        return
    except Exception as error:  # a broken installation raises what it likes
        yield fail("torch", f"is installed, but cannot be imported: {error}", f"{wanted}, after removing it")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    told = f"{torch.__version__} ({build})"
    if numbers(torch.__version__) < LEAST_TORCH:
        yield fail("torch", told, wanted)
    else:
        yield ok("torch", told)
    yield _triton(cuda=bool(torch.version.cuda))


def _triton(*, cuda: bool) -> Finding:
    found = version("triton")
    if found is None:
        if cuda:
            return note(
                "triton",
                "is not installed: float8 casts on a GPU run in plain PyTorch, with more passes over memory, "
                "and torch.compile has no GPU code",
                f"pip install 'triton>={_dotted(LEAST_TRITON)}'",
            )
        return ok("triton", "not installed, and not needed without a GPU")
    if numbers(found) < LEAST_TRITON:
        return note("triton", found, f"pip install 'triton>={_dotted(LEAST_TRITON)}'")
    return ok("triton", found)


def nvidia_smi() -> list[str]:
    """One line a GPU, as the driver tells it: name, driver, MiB, compute capability; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _gpus() -> Iterator[Finding]:
    lines = nvidia_smi()
    try:
        torch = importlib.import_module("torch")
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # told by _torch already
        seen = 0
    for number, line in enumerate(lines):
        fields = [part.strip() for part in line.split(",")]
        name, driver, mebibytes, capability = (*fields, "?", "?", "?", "?")[:4]
        size = f"{int(mebibytes) / 1024:.0f} GiB" if mebibytes.isdecimal() else "memory unknown"
        yield ok(f"GPU {number}", f"{name}, {size}, compute capability {capability}, driver {driver}")
    if lines and not seen:
        yield fail(
            "CUDA",
            f"the driver shows {len(lines)} GPU(s), but torch sees none",
            "install a CUDA build of torch that this driver supports, and look at CUDA_VISIBLE_DEVICES",
        )
    elif seen and not lines:
        torch = importlib.import_module("torch")
        for number in range(seen):
            yield ok(f"GPU {number}", torch.cuda.get_device_name(number))
    elif not seen:
        yield note("GPU", "none: training runs on the CPU, and float8 is emulated (the same numbers, slower)")


def _torchrun() -> Finding:
    try:
        there = importlib.util.find_spec("torch.distributed.run") is not None
        distributed = there and importlib.import_module("torch.distributed").is_available()
    except Exception:  # no torch, or a broken one
        there = distributed = False
    if not distributed:
        return fail("torchrun", "torch.distributed is not there", "install torch with distributed support")
    return ok("torchrun", "there (python -m torch.distributed.run)")


def _compiler() -> Finding:
    missing = missing_cxx()
    if missing is None:
        return ok("C++", "a compiler starts, for --training.compile on a CPU")
    return note(
        "C++",
        f"{missing!r} does not start, so --training.compile has no CPU code",
        "apt install g++ (macOS: xcode-select --install), or name another one in CXX",
    )


def _packages() -> Iterator[Finding]:
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        yield fail("packages", f"not installed: {', '.join(lacking)}", "pip install 'octavo[train]'")
    else:
        yield ok("packages", ", ".join(f"{name} {version(name)}" for name in _NEEDED))
    for name, use in _OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield note("packages", f"{name} is not installed ({use})", f"pip install {name}")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ok("CPU", f"{cores} cores, {total / 2**30:.0f} GiB of memory")
