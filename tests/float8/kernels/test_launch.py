"""How kernels are launched."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.float8.kernels import needs

pytestmark = needs.triton


def test_a_kernel_runs_on_the_gpu_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.float8.kernels import kernel_launch

    devices: list[object] = []
    launches: list[tuple] = []
    monkeypatch.setattr(kernel_launch, "_REAL", (SimpleNamespace,))
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or nullcontext())
    x = SimpleNamespace(is_cuda=True, device="cuda:1")
    kernel = {(2,): lambda *args, **constants: launches.append((args, constants))}

    kernel_launch.OnItsDevice(kernel)[(2,)](x, 3, BLOCK=4)
    kernel_launch.OnItsDevice(kernel)[(2,)](torch.empty(1, device="meta"), 3, BLOCK=4)

    assert devices == ["cuda:1"]
    assert launches[0] == ((x, 3), {"BLOCK": 4})
    assert len(launches) == 2
