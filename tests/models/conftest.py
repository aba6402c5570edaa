"""Fixtures of the tests of models."""

from tests.helpers.hostile import sentinel

__all__ = ["sentinel"]
