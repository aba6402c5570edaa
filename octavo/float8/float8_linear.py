"""`Float8Linear` under torchao's import path."""

from octavo.float8.linear import Float8Linear

__all__ = ["Float8Linear"]
