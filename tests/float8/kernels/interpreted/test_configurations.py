"""Every configuration of every kernel gives the reference's bits: timing decides nothing but speed."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.float8.kernels import against_reference as check


@pytest.mark.parametrize(("module", "name", "config", "user"), check.CONFIGURATIONS)
def test_bits_do_not_depend_on_it(module: ModuleType, name: str, config: dict, user: str) -> None:
    check.check_configuration(module, name, config, user, "cpu")
