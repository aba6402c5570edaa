"""What a benchmark ran on, and in what state the GPU was while it did.

A speed without its clock is half a figure: an H100 under a power limit runs products of random numbers a
third slower than its data sheet says, and products of zeros at full speed. So `nvidia-smi` notes clock,
power and temperature twice a second, in a process of its own, which costs the benchmark nothing. Where there
is none, the report says n/a.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from octavo.train.run_record import processor

ROOT = Path(__file__).resolve().parents[2]
QUERIES = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "temperature_celsius": "temperature.gpu",
}
_PACKAGES = ("torch", "triton", "torchao", "bitsandbytes")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, its software, and the commit of this checkout."""
    versions = {name: _version(name) for name in _PACKAGES}
    facts: dict[str, Any] = {
        "device": device_name(device),
        "kind": device.type,
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["driver"] = _smi(device, "driver_version")
        facts["power_limit_watts"] = _smi(device, "power.limit")
    else:
        facts["threads"] = torch.get_num_threads()
        facts["cores"] = os.cpu_count()
        facts["load"] = round(os.getloadavg()[0], 2)
    return facts


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _smi_command(device: torch.device, *fields: str) -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None or device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ["-i", f"GPU-{uuid}"] if uuid is not None else []
    return [program, *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _smi(device: torch.device, field: str) -> str | None:
    command = _smi_command(device, field)
    if command is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class Conditions:
    """Clock, power and temperature of a GPU within a `with`; `summary` tells them afterwards."""

    def __init__(self, device: torch.device):
        self._command = _smi_command(device, *QUERIES.values())
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "smi.csv"
        self._log.touch()
        self._told = ""

    def __enter__(self) -> Self:
        if self._command is not None:
            with self._log.open("w") as log:
                command = [*self._command, "-lms", "500"]
                self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._told = self._log.read_text()
        self._folder.cleanup()

    def summary(self) -> dict[str, dict[str, float]] | None:
        """Least, median and most of each quantity; None where nothing was measured."""
        return summarise(self._log.read_text() if self._log.exists() else self._told)


def summarise(lines: str) -> dict[str, dict[str, float]] | None:
    """Of what `nvidia-smi` printed, one line a moment; words like [N/A] are passed over."""
    rows = [line.split(",") for line in lines.splitlines()]
    columns: dict[str, list[float]] = {name: [] for name in QUERIES}
    for row in rows:
        if len(row) != len(columns):
            continue
        for values, text in zip(columns.values(), row, strict=True):
            try:
                values.append(float(text))
            except ValueError:
                continue
    found = {
        name: {"least": min(values), "median": statistics.median(values), "most": max(values)}
        for name, values in columns.items()
        if values
    }
    return found or None
