"""Fixtures of the tests of foreign formats."""

from tests.helpers.hostile import sentinel

__all__ = ["sentinel"]
