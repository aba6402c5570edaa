"""Fixtures of the tests of checkpoints."""

import pytest

from tests.helpers.hostile import sentinel

__all__ = ["sentinel"]


@pytest.fixture
def folder(tmp_path):
    """The folder of a run's checkpoints."""
    return tmp_path / "checkpoint"
