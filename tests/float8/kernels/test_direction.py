"""Kernels know tensors and numbers, and cost nothing where there is no GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "octavo/float8/kernels"


def test_kernels_import_torch_triton_and_each_other() -> None:
    files = sorted(KERNELS.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                if name.startswith("octavo"):
                    assert name.startswith("octavo.float8.kernels"), f"{file.name} imports {name}"
                else:
                    top = name.split(".")[0]
                    assert top in {"torch", "triton", *sys.stdlib_module_names}, f"{file.name} imports {name}"


def test_casting_on_a_cpu_imports_no_triton() -> None:
    program = (
        "import sys, torch, octavo.float8 as f\n"
        "linear = f.Float8Linear(16, 16, config='rowwise', emulate=True)\n"
        "linear(torch.ones(16, 16)).sum().backward()\n"
        "print('triton' in sys.modules, 'octavo.float8.kernels.ops' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
