"""Fixtures for tests of the library."""

import pytest

from octavo.float8 import matmul


@pytest.fixture
def products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where joined or sharded products are compared with whole ones bit for bit, every product is `torch.mm`
    in float32: it adds an element's terms in one order whatever the number of columns, on every CPU tried.
    oneDNN's bfloat16 products, which emulation takes where a CPU has the units, need not.
    """
    monkeypatch.setattr(matmul, "BFLOAT16_UNITS", False)
