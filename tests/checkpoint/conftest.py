"""What tests of checkpoints share."""

import pytest


@pytest.fixture
def folder(tmp_path):
    """Where a run's checkpoints go."""
    return tmp_path / "checkpoint"
