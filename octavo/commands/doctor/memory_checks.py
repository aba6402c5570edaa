"""The memory that a job would take, as `octavo estimate` says, beside what this machine has."""

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
from octavo.commands.doctor.findings import Finding, note, ok, warn
from octavo.config import ConfigError
from octavo.config.programs import octavo_command
from octavo.launch import launcher

_SECONDS = 11.5  # since it was begun: a large model's trace takes longer, and the whole of doctor should not


class MemoryEstimate:
    """An `octavo estimate` at work in a process of its own, which takes neither a GPU nor the memory that it
    tells: it is begun before everything else is looked at, and asked last.
    """

    def __init__(self, options: Sequence[str], processes: int, gpus: int) -> None:
        self.asked = ["estimate", *options, f"--ngpu={processes}", f"--device={'h100' if gpus else 'cpu'}"]
        self._begun = time.monotonic()
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                [sys.executable, "-P", "-m", "octavo.cli", *self.asked, "--json"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a group of its own, with what it forks
                preexec_fn=lambda: os.nice(10),  # what is looked at meanwhile comes first
            )
        except OSError:
            self._process = None

    def peak_bytes(self) -> float | None:
        """The peak of one process; None if it is not told in time."""
        if self._process is None:
            return None
        rest = self._begun + _SECONDS - time.monotonic()
        try:
            told, _ = self._process.communicate(timeout=max(0.01, rest))
            return float(json.loads(told)["peak_bytes"])
        except (subprocess.SubprocessError, ValueError, LookupError, TypeError):
            return None
        finally:
            self.end()

    def end(self) -> None:
        """Leave no process behind; also of Ctrl-C, which a group of its own does not get."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def begin(options: Sequence[str], gpus: int) -> MemoryEstimate | None:
    """Begin to estimate the job of `options`; None if it is none, or runs somebody's code."""
    try:
        planned = launcher.plan(options, os.environ, gpus=gpus, cores=os.cpu_count() or 1)
        job = config.load(planned.options)
    except (ConfigError, ImportError):  # of what is told where it is looked at
        return None
    return (
        None if job.experimental.custom_import else MemoryEstimate(planned.options, planned.processes, gpus)
    )


def look(estimate: MemoryEstimate, *, here: int, gpus: int) -> Finding:
    """Of a job with `here` processes on this machine."""
    each = estimate.peak_bytes()
    if each is None:
        by_hand = f"{octavo_command()} {shlex.join(estimate.asked)}"
        return note("memory", "what the job takes is not known: no estimate in a few seconds", by_hand)
    if gpus:
        import torch

        have = torch.cuda.get_device_properties(0).total_memory
        told = f"estimated {each / 1e9:,.1f} GB a process, and a GPU has {have / 1e9:,.1f} GB"
        needed = each
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed = each * here
        told = f"estimated {needed / 1e9:,.1f} GB of tensors here, and the machine has {have / 1e9:,.1f} GB"
    if needed <= have:
        return ok("memory", told)
    return warn(
        "memory",
        f"{told}: it will not fit",
        "lower training.local_batch_size or training.seq_len, recompute more (activation_checkpoint.mode = "
        "full), or shard over more processes",
    )
