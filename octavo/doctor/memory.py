"""The memory that a job would take, as `octavo estimate` says, beside what this machine has."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch

from octavo.config.programs import octavo_command
from octavo.doctor.findings import Finding, note, ok, warn

_SECONDS = 6.0  # a large model's trace takes longer, and the whole of doctor should not


def look(options: Sequence[str], *, processes: int, here: int, gpus: int) -> Finding:
    """Of a job of `processes`, `here` of them on this machine. The estimate runs in a process of its own,
    which takes neither a GPU nor the memory that it tells.
    """
    asked = ["estimate", *options, f"--ngpu={processes}", f"--device={'h100' if gpus else 'cpu'}"]
    by_hand = f"{octavo_command()} {shlex.join(asked)}"
    each = _peak_bytes(asked)
    if each is None:
        return note("memory", "what the job takes is not known: no estimate in a few seconds", by_hand)
    if gpus:
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


def _peak_bytes(asked: Sequence[str]) -> float | None:
    """The peak of one process, as `octavo` with the arguments `asked` tells; None if it does not in time."""
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.cli", *asked, "--json"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a group of its own, with what it forks
        )
    except OSError:
        return None
    try:
        told, _ = process.communicate(timeout=_SECONDS)
        return float(json.loads(told)["peak_bytes"])
    except (subprocess.SubprocessError, ValueError, LookupError, TypeError):
        return None
    finally:  # also of Ctrl-C, which a group of its own does not get
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
