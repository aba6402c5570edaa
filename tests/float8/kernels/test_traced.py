"""The compiler traces the operators as kernel launches, not as opaque calls. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.float8.kernels import needs
from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[3]
pytestmark = needs.triton

# Fake tensors on a GPU that need not exist; the compiler's own order of tracing: functionalise, then record.
PROGRAM = """
import logging
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from octavo.float8.kernels import ops

logging.disable(logging.WARNING)  # without a GPU it cannot ask which arguments kernels write to
STEP = [0.9, 0.9, 0.95, 0.01, 0.5, 1e-8]
E4M3 = torch.float8_e4m3fn
with FakeTensorMode():
    on = {"device": "cuda"}
    t = {
        "x": torch.empty(256, 512, dtype=torch.bfloat16, **on),
        "w": torch.empty(512, dtype=torch.bfloat16, **on),
        "heads": torch.empty(2, 4, 128, 128, dtype=torch.bfloat16, **on).transpose(1, 2),
        "amax": torch.ones(1, 1, **on),
        "f": torch.ones(256, 256, **on),
        "cos": torch.empty(128, 64, **on),
        "rms": torch.empty(256, **on),
        "rows": torch.empty(1, 256, dtype=torch.int32, **on),
        "columns": torch.empty(1, 512, dtype=torch.int32, **on),
    }
    calls = [
        lambda t: ops.cast_by_tensor(t["x"], E4M3, "fp32", True, True),
        lambda t: ops.cast_by_rows(t["x"], E4M3, "pow2", True, True),
        lambda t: ops.cast_by_rows(t["x"], E4M3, "pow2", False, True),
        lambda t: ops.cast_by_lines(t["x"], 128, E4M3, "fp32", True, True),
        lambda t: ops.cast_by_tiles(t["x"], 128, E4M3, "fp32", True, True),
        lambda t: ops.cast_with_maxima(t["x"], t["rows"], t["columns"], E4M3, "fp32"),
        lambda t: ops.silu_mul_with_maxima(t["x"], t["x"]),
        lambda t: ops.silu_mul_backward_with_maxima(t["x"], t["x"], t["x"]),
        lambda t: ops.cast_by_given_scale(t["x"], t["amax"], E4M3, "fp32", True, True),
        lambda t: ops.adamw_with_maxima(*[t["f"]] * 4, STEP, torch.bfloat16),
        lambda t: ops.adamw_with_squares(*[t["f"]] * 4, STEP, 128, E4M3, "fp32", None),
        lambda t: ops.rope_backward_with_maxima(t["heads"], t["cos"], t["cos"]),
        lambda t: ops.add_rms_norm_with_maxima(t["x"], t["x"], t["w"], 1e-5),
        lambda t: ops.add_rms_norm_backward_with_maxima(t["x"], t["x"], t["x"], t["rms"], t["w"]),
    ]
    for call in calls:
        expected = call(t)
        nodes = make_fx(dispatch_functionalize(call))(t).graph.nodes
        names = [str(node.target) for node in nodes]
        kernels = sum("triton_kernel_wrapper" in name for name in names)
        opaque = [name for name in names if name.startswith("octavo")]
        results = next(node for node in nodes if node.op == "output").args[0]
        seen = [(tuple(r.meta["val"].shape), r.meta["val"].dtype) for r in results]
        assert seen == [(tuple(t.shape), t.dtype) for t in expected], (seen, expected)
        print(kernels, *opaque)
"""


@pytest.fixture(scope="module")
def traced() -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [warm.python(), "-c", PROGRAM],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_compiled_code_launches_the_kernels_itself(traced: list[str]) -> None:
    # Launches: maxima, then cast; rows, then columns; and one where a tile is enough.
    assert traced == ["2", "2", "2", "1", "1", "1", "1", "1", "1", "1", "1", "1", "1", "1"]
