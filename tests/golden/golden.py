"""Golden losses: the first steps of the debug model, kept in the repo, so that a change which moves numerics
is seen.

    python -m tests.golden.golden        records them anew; say in the commit why they moved

They are compared bit for bit where they were recorded (torch version, processor, instruction sets), else
within `LIMITS`. Processors add in different orders. That moves a loss in float32 by its last bit; in bfloat16
and float8 it moves values over a rounding's edge, and the difference grows from step to step.
"""

import json
import os
import tempfile
from pathlib import Path

import torch

from tests.helpers import launching

FILE = Path(__file__).parent / "losses.json"
FLAGS = {"training.steps": 10, "training.dataset": "shakespeare"}
RUNS = {
    "float32": {"training.mixed_precision_param": "float32"},
    # Seconds a step on a CPU without such units.
    "bfloat16": {"training.mixed_precision_param": "bfloat16", "training.steps": 3},
    "tensorwise": {"training.mixed_precision_param": "float32", **launching.recipe("tensorwise")},
    "rowwise": {"training.mixed_precision_param": "float32", **launching.recipe("rowwise")},
}
LIMITS = {"float32": 1e-6, "bfloat16": 1.5e-4, "tensorwise": 1.5e-4, "rowwise": 1.5e-4}
"""Relative. The largest difference measured between any two of an Intel and an AMD processor, AVX2, AVX-512
and AVX-512 BF16 in PyTorch or oneDNN, and PyTorch without vector instructions, is 1.2e-7 in float32, 5.0e-5
in bfloat16 and 7.3e-5 in float8. These are at least twice that, and less than float32 is from the others.
"""


def machine() -> dict[str, str | bool]:
    """What the last bit of a CPU's arithmetic depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    about = dict(line.replace("\t", "").split(":")[:2] for line in lines if ":" in line)
    return {
        "torch": torch.__version__,
        "processor": "".join(about.get(key, "?") for key in ("vendor_id", "cpu family", "model")).strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }


def record() -> None:
    """Train every run and write `losses.json`."""
    losses = {}
    for name, flags in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            losses[name] = launching.train(Path(folder), {**FLAGS, **flags}).losses
    FILE.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    record()
