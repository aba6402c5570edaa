"""The self-check passes on this device, and fails if a product or a cast is wrong."""

import pytest
import torch

from octavo.float8.checks import selfcheck
from octavo.float8.quantize import Quantized
from octavo.float8.recipe import RECIPES

CPU = torch.device("cpu")


def test_every_product_of_every_recipe_is_checked_and_right():
    checks = list(selfcheck.check_device(CPU))

    emulated = {(c.recipe, c.gemm) for c in checks if c.backend == "emulation"}
    assert emulated == {
        (r.name, name) for r in RECIPES.values() for name, gemm in r.gemms.items() if gemm.float8
    }
    native = {c.recipe for c in checks if c.backend == "torch._scaled_mm"}
    assert {"tensorwise", "rowwise", "rowwise_with_gw_hp"} <= native
    assert [c for c in checks if not c.passed] == []


def test_a_wrong_product_is_found(monkeypatch):
    right = selfcheck.matmul
    monkeypatch.setattr(selfcheck, "matmul", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)

    assert not any(c.passed for c in selfcheck.check_device(CPU))


def test_a_cast_with_one_wrong_bit_is_found(monkeypatch):
    right, calls = selfcheck.quantize, []

    def wrong(x, cast):
        made = right(x, cast)
        calls.append(x)
        if len(calls) % 4 != 3:  # the third of four is the device's cast of the first operand
            return made
        data = made.data.clone()
        data.view(torch.uint8)[0, 0] ^= 1
        return Quantized(data, made.scale)

    monkeypatch.setattr(selfcheck, "quantize", wrong)

    assert not any(c.casts_equal for c in selfcheck.check_device(CPU))


def test_an_error_is_reported_not_raised(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(selfcheck, "matmul", broken)

    (failure,) = {c.failure for c in selfcheck.check_device(CPU)}
    assert failure == "RuntimeError: no kernel image is available"


@pytest.mark.gpu
def test_every_product_is_right_on_this_gpu():
    checks = list(selfcheck.check_device(torch.device("cuda")))

    assert [c for c in checks if not c.passed] == []
    assert any(c.backend != "emulation" for c in checks)
