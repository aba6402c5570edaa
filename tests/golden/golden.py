"""Golden losses: the first steps of the debug model, kept in the repo, so that a change which moves numerics
is seen.

    python -m tests.golden.golden        records them anew; say in the commit why they moved

They are compared bit for bit where they were recorded (torch version, instruction sets, CPU vendor), else
within 1e-3.
"""

import json
import tempfile
from pathlib import Path

import torch

from tests import runs

FILE = Path(__file__).parent / "losses.json"
FLAGS = {"training.steps": 10, "training.dataset": "shakespeare"}
RUNS = {
    "float32": {"training.mixed_precision_param": "float32"},
    # Seconds a step on a CPU without such units.
    "bfloat16": {"training.mixed_precision_param": "bfloat16", "training.steps": 3},
    "tensorwise": {"training.mixed_precision_param": "float32", **runs.recipe("tensorwise")},
    "rowwise": {"training.mixed_precision_param": "float32", **runs.recipe("rowwise")},
}


def machine() -> dict[str, str | bool]:
    """What the last bit of a CPU's arithmetic depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "vendor": vendor,
    }


def record() -> None:
    """Train every run and write `losses.json`."""
    losses = {}
    for name, flags in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            losses[name] = runs.train(Path(folder), {**FLAGS, **flags}).losses
    FILE.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    record()
