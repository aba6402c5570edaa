"""Joined products are compared with lone ones bit for bit, so every product is `torch.mm` in float32 here.

It adds an element's terms in one order whatever the number of columns, on every CPU tried; oneDNN's bfloat16
products, which emulation takes where a CPU has the units, need not.
"""

import pytest

from octavo.float8 import matmul


@pytest.fixture(autouse=True)
def no_bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "BFLOAT16_UNITS", False)
