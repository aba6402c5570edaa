"""Compares a job's memory, as `octavo estimate` predicts it, with this machine's."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from octavo import config
from octavo.commands.doctor.findings import Finding, Level, note, ok
from octavo.config import ConfigError
from octavo.core.host_memory import host_memory
from octavo.core.programs import octavo_command
from octavo.launch import launcher

_SECONDS = 11.5  # since the start of the estimate; tracing a large model takes longer than doctor should


class MemoryEstimate:
    """An `octavo estimate` in a separate process, which uses neither a GPU nor the estimated memory. It
    starts before all other checks, and its result is read last.
    """

    def __init__(self, options: Sequence[str], processes: int, gpus: int) -> None:
        device = "h100" if gpus else "cpu"
        self.arguments = ["estimate", *options, f"--ngpu={processes}", f"--device={device}"]
        self._start = time.monotonic()
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                [sys.executable, "-P", "-m", "octavo.cli", *self.arguments, "--json"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a process group of its own, with its forked workers
                preexec_fn=lambda: os.nice(10),  # the other checks have priority
            )
        except OSError:
            self._process = None

    def peak_bytes(self) -> float | None:
        """Wait for the peak of one process; None if the estimate takes too long or fails."""
        if self._process is None:
            return None
        remaining = self._start + _SECONDS - time.monotonic()
        try:
            output, _ = self._process.communicate(timeout=max(0.01, remaining))
            return float(json.loads(output)["peak_bytes"])
        except (subprocess.SubprocessError, ValueError, LookupError, TypeError):
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the whole process group, which a Ctrl-C does not reach."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def start_estimate(options: Sequence[str], gpus: int) -> MemoryEstimate | None:
    """Start an estimate of the job of `options`; None if they are invalid or import user code."""
    try:
        planned = launcher.plan(options, os.environ, gpus=gpus, cores=launcher.usable_cores())
        job = config.load(planned.options)
    except (ConfigError, ImportError):  # reported by the check of the job
        return None
    if job.experimental.custom_import:
        return None
    return MemoryEstimate(planned.options, planned.processes, gpus)


def check_memory(estimate: MemoryEstimate, *, processes: int, gpus: int) -> Finding:
    """Compare the estimate with this machine's memory. processes: how many run on this machine."""
    peak = estimate.peak_bytes()
    if peak is None:
        by_hand = f"{octavo_command()} {shlex.join(estimate.arguments)}"
        return note("memory", f"the job's memory is not known: no estimate within {_SECONDS:g} s", by_hand)
    if gpus:
        import torch

        available, needed = torch.cuda.get_device_properties(0).total_memory, peak
        message = f"estimated {peak / 1e9:,.1f} GB per process, and a GPU has {available / 1e9:,.1f} GB"
    else:
        available, needed = host_memory(), peak * processes
        message = (
            f"estimated {needed / 1e9:,.1f} GB of tensors here, and the machine has {available / 1e9:,.1f} GB"
        )
    if needed <= available:
        return ok("memory", message)
    return Finding(
        Level.WARN,
        "memory",
        f"{message}: it will not fit",
        "lower training.local_batch_size or training.seq_len, recompute more (activation_checkpoint.mode = "
        "full), or shard over more processes",
    )
