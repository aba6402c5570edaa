"""The operators pass PyTorch's checks: schema, fake results, and tracing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from octavo.float8.kernels import ops
from tests.float8.kernels.against_reference import E4M3, make_x

X = make_x((37, 70), torch.bfloat16, "spread")
Y, W = make_x((37, 70), torch.bfloat16, "spread", 1), torch.ones(70, dtype=torch.bfloat16)
FEW, WIDE = torch.ones(37), torch.zeros(1, 70, dtype=torch.int32)
WEIGHT = tuple(torch.rand(37, 70) for _ in range(4))
STEP = [0.9, 0.9, 0.95, 0.01, 0.5, 1e-8]
CALLS: dict[str, tuple[Any, tuple]] = {
    "tensor": (ops.cast_by_tensor, (X, E4M3, "fp32", True, True)),
    "tensor, columns": (ops.cast_by_tensor, (X, E4M3, "fp32", False, True)),
    "tiles": (ops.cast_by_tiles, (X, 128, E4M3, "fp32", True, True)),
    "rows": (ops.cast_by_rows, (X, E4M3, "pow2", True, True)),
    "rows alone": (ops.cast_by_rows, (X, E4M3, "pow2", True, False)),
    "columns alone": (ops.cast_by_rows, (X, E4M3, "pow2", False, True)),
    "lines": (ops.cast_by_lines, (X, 32, E4M3, "e8m0", True, True)),
    "lines, rows": (ops.cast_by_lines, (X, 128, E4M3, "fp32", True, False)),
    "joined rows": (ops.cast_joined, ([X, Y[:16]], [1, -1], E4M3, "pow2", True)),
    "joined lines": (ops.cast_joined, ([X, Y[:16]], [1, 32], E4M3, "e8m0", True)),
    "joined tiles": (ops.cast_joined, ([X[:32], Y], [16, 16], E4M3, "fp32", True)),
    "joined, rows alone": (ops.cast_joined, ([X, Y], [1, -1], E4M3, "pow2", False)),
    "given": (ops.cast_with_maxima, (X, FEW[None].int(), WIDE, E4M3, "fp32")),
    "given scale": (ops.cast_by_given_scale, (X, torch.ones(1, 1), E4M3, "fp32", True, True)),
    "adamw, maxima": (ops.adamw_with_maxima, (*WEIGHT, STEP, torch.bfloat16)),
    "adamw, squares": (ops.adamw_with_squares, (*WEIGHT, STEP, 128, E4M3, "fp32", None)),
    "silu_mul": (ops.silu_mul_with_maxima, (X, Y)),
    "silu_mul again": (ops.silu_mul_again_with_maxima, (X, Y, X)),
    "silu_mul backward": (ops.silu_mul_backward_with_maxima, (X, Y, X)),
    "tensor, given": (ops.cast_by_tensor_with_maxima, (X, FEW[:1].int(), E4M3, "fp32", True, True)),
    "norm alone": (ops.rms_norm_with_maxima, (X, W, 1e-5)),
    "norm": (ops.add_rms_norm_with_maxima, (X, Y, W, 1e-5)),
    "norm backward": (ops.add_rms_norm_backward_with_maxima, (X, Y, X, FEW, W)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
def test_operator(call: str) -> None:
    operator, arguments = CALLS[call]
    torch.library.opcheck(operator, arguments, test_utils=("test_faketensor", "test_schema"))


def test_all_are_checked() -> None:
    named = {value for value in vars(ops).values() if isinstance(value, torch._ops.OpOverload)}
    assert named == {operator for operator, _ in CALLS.values()}


def test_a_kernel_runs_on_the_gpu_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    of: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: of.append(x) or nullcontext())
    ops.silu_mul_with_maxima(X, Y)
    assert len(of) == 1
    assert of[0] is X
