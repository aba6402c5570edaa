"""The memory that a job would take, as `octavo estimate` says, beside what this machine has."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import torch

from octavo.config.programs import octavo_command
from octavo.doctor.findings import Finding, note, ok

_SECONDS = 6.0  # a large model's trace takes longer, and the whole of doctor should not


def look(options: Sequence[str], *, processes: int, here: int, gpus: int) -> Finding:
    """Of a job of `processes`, `here` of them on this machine. The estimate runs in a process of its own,
    which takes neither a GPU nor the memory that it tells.
    """
    asked = ["estimate", *options, f"--ngpu={processes}", f"--device={'h100' if gpus else 'cpu'}"]
    by_hand = f"{octavo_command()} {shlex.join(asked)}"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "octavo.cli", *asked, "--json"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        each = float(json.loads(done.stdout)["peak_bytes"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
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
    return note(
        "memory",
        f"{told}: it will not fit",
        "lower training.local_batch_size or training.seq_len, recompute more (activation_checkpoint.mode = "
        "full), or shard over more processes",
    )
