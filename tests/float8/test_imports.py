"""What importing the library loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDS = "import torch, torch.distributed.fsdp, torch.distributed.tensor.parallel"


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return set(result.stdout.split())


def test_importing_loads_nothing_but_torch() -> None:
    extra = modules_after("import octavo.float8, octavo.utils") - modules_after(NEEDS)
    assert {m for m in extra if m.split(".")[0] != "octavo"} == set()
    assert {m for m in extra if not m.startswith("octavo.float8")} == {"octavo", "octavo.utils"}


def test_every_public_name_exists() -> None:
    import octavo.float8 as library

    assert all(hasattr(library, name) for name in library.__all__)
    assert len(set(library.__all__)) == len(library.__all__)


def test_the_tutorials_import_paths() -> None:
    from octavo.float8.float8_linear import Float8Linear
    from octavo.float8.float8_linear_utils import convert_to_float8_training
    from octavo.float8.float8_tensor_parallel import Float8ColwiseParallel
    from octavo.utils import TORCH_VERSION_AT_LEAST_2_5

    assert Float8Linear.__module__ == "octavo.float8.linear"
    assert convert_to_float8_training.__module__ == "octavo.float8.convert"
    assert Float8ColwiseParallel.__module__ == "octavo.float8.distributed.parallel_styles"
    assert TORCH_VERSION_AT_LEAST_2_5


def test_casting_on_a_cpu_imports_no_triton() -> None:
    loaded = modules_after(
        "import torch, octavo.float8 as f\n"
        "f.Float8Linear(16, 16, config='rowwise', emulate=True)(torch.ones(16, 16)).sum().backward()"
    )
    assert "octavo.float8.linear" in loaded
    assert loaded.isdisjoint({"triton", "octavo.float8.kernels.ops"})
